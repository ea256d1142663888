"""Where others reach this neuron: which address is the right one, and keeping the chain's in step.

Knows the sources of an address, the chain's limit on publishing, and what to tell an operator. Does
not know whether anybody can connect (`dial.py`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from mapreduce.chain.axons import read_axon, serve_axon
from mapreduce.errors import (
    ConfigError,
    MapReduceError,
    NotRegistered,
    Refused,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import bittensor as bt

    from mapreduce.chain.axons import AxonState, Endpoint
    from mapreduce.config import AxonConfig

LOOK_S = 60.0  # at the chain
LOOK_UP_S = 600.0  # the address
LOOK_UP_TIMEOUT_S = 5.0
MAX_ADDRESS_BYTES = 64
TELL_AGAIN_S = 600.0
WAIT_S = 60.0  # at most, before the chain is asked again

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What is published, and in words where it comes from."""

    ip: str
    port: int
    source: str

    @property
    def endpoint(self) -> Endpoint:
        """In the form in which the chain shows it."""
        return self.ip, self.port

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


def choose_address(
    config: AxonConfig,
    port: int,
    *,
    looked_up: str | None,
    shown: str | None,
    one_machine: bool,
) -> Address:
    """The address to publish for a neuron that listens on `port`. `shown` is the IP address that
    the chain shows of it; `one_machine`: all parties are on this one.

    Raises ConfigError where none is known: an address is never guessed.
    """
    sources = (
        (config.external_ip, "axon.external_ip"),
        (looked_up, "axon.lookup_url"),
        (None if ipaddress.ip_address(config.ip).is_unspecified else config.ip, "axon.ip"),
        ("127.0.0.1" if one_machine else None, "the chain is one of this machine"),
        (shown, "the chain shows it"),
    )
    for ip, source in sources:
        if ip is not None:
            return Address(ip=ip, port=config.external_port or port, source=source)
    raise ConfigError(
        f"listening on {config.ip}, which nobody can dial, and the chain shows no address of "
        "this hotkey yet: give the public one with --axon.external_ip, or a service that knows it "
        "with --axon.lookup_url"
    )


async def look_up(url: str) -> str:
    """The address from which a service sees this host. Raises Unavailable if it does not say."""
    try:
        async with (
            asyncio.timeout(LOOK_UP_TIMEOUT_S),
            aiohttp.ClientSession() as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            body = await answer.content.read(MAX_ADDRESS_BYTES)
            status = answer.status
    except TimeoutError:
        raise Unavailable(f"axon.lookup_url: no answer in {LOOK_UP_TIMEOUT_S:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"axon.lookup_url: {error or type(error).__name__}") from None
    try:
        if status != 200:
            raise ValueError
        address = ipaddress.ip_address(body.decode("ascii").strip())
    except ValueError:
        raise Unavailable(
            f"axon.lookup_url: status {status}, and not the text of one IP address"
        ) from None
    if address.is_unspecified or address.is_multicast:
        raise Unavailable(f"axon.lookup_url: nobody can dial {address}")
    return str(address)


class AxonUpkeep:
    """The published address of one hotkey. `tell` is told why the neuron is not reached as it
    should be, and None once it is; `register_hint` is the command that registers the hotkey."""

    def __init__(
        self,
        client: bt.Client,
        wallet: bt.Wallet,
        netuid: int,
        config: AxonConfig,
        port: int,
        *,
        one_machine: bool,
        register_hint: str,
        tell: Callable[[str | None], None],
    ) -> None:
        self._client = client
        self._wallet = wallet
        self._hotkey: str = wallet.hotkey.ss58_address
        self._netuid = netuid
        self._config = config
        self._port = port
        self._one_machine = one_machine
        self._register_hint = register_hint
        self._tell = tell
        self._looked_up: str | None = None
        self._looked_up_at = float("-inf")
        self._from_chain: str | None = None  # as it was at the start: later it may be another's
        self._right: Endpoint | None = None  # what the chain shows, as far as we know
        self._overwritten = 0
        self._told_at: dict[str, float] = {}

    async def publish(self) -> Address:
        """Finds the address and has the chain show it, as soon as the chain allows.

        Raises ConfigError, NotRegistered, Refused or ChainUnavailable.
        """
        state = await self._read()
        if state.shown is not None:
            self._from_chain = state.shown[0]
        address = await self._find()
        while state.shown != address.endpoint:
            if not state.registered:
                raise NotRegistered(
                    f"the hotkey {self._hotkey} is not registered on netuid {self._netuid}; "
                    f"register it with `{self._register_hint}`"
                )
            if await self._serve(address, state):
                break
            await asyncio.sleep(min(max(state.wait_s, state.block_time_s), WAIT_S))
            state = await self._read()
        self._right = address.endpoint
        return address

    async def keep(self) -> None:
        """Has the chain show the address, also one that is looked up later, for ever."""
        while True:
            await asyncio.sleep(LOOK_S * random.uniform(0.9, 1.1))
            try:
                await self._check()
            except MapReduceError as error:
                _log.warning("the axon cannot be checked", extra={"error": str(error)})

    async def _check(self) -> None:
        """Looks once, and mends what it can."""
        state = await self._read()
        if not state.registered:
            self._tell(f"the hotkey is not registered on netuid {self._netuid} any more")
            self._say(
                f"the hotkey {self._hotkey} is not registered on netuid {self._netuid} any more: "
                f"it gets no new work and no pay; register it with `{self._register_hint}`"
            )
            return
        address = await self._find()
        if state.shown != address.endpoint:
            if self._right == address.endpoint:
                self._overwritten += 1
                why = "its registration may be new"
                if self._overwritten > 1 and state.shown is not None:
                    why = "another process seems to run with this hotkey: stop one of the two"
                self._say(f"the chain shows {_text(state)} for this hotkey, not {address}: {why}")
            elif self._right is not None:
                source = {"address_from": address.source}
                _log.warning("the address has changed", extra={"to": address, **source})
            self._right = None
            if not await self._serve(address, state):
                return
        self._right = address.endpoint
        self._tell(None)

    async def _find(self) -> Address:
        config, url = self._config, self._config.lookup_url
        now = asyncio.get_running_loop().time()
        if url is not None and config.external_ip is None and now - self._looked_up_at > LOOK_UP_S:
            self._looked_up_at = now
            try:
                self._looked_up = await look_up(url)
                if not ipaddress.ip_address(self._looked_up).is_global:
                    self._say(
                        f"axon.lookup_url answers {self._looked_up}, which only a private network "
                        "can dial; it is published all the same"
                    )
            except Unavailable as error:
                _log.warning("the address cannot be looked up", extra={"error": str(error)})
        return choose_address(
            config,
            self._port,
            looked_up=self._looked_up,
            shown=self._from_chain,
            one_machine=self._one_machine,
        )

    async def _read(self) -> AxonState:
        return await read_axon(self._client, self._netuid, self._hotkey)

    async def _serve(self, address: Address, state: AxonState) -> bool:
        """Publishes, unless the chain would refuse it now; returns whether it is done."""
        if state.wait_blocks:
            waits = f"waits {state.wait_blocks} blocks for the chain's limit on publishing axons"
            self._tell(waits)
            _log.info(waits, extra={"axon": address, "seconds": round(state.wait_s)})
            return False
        try:
            await serve_axon(self._client, self._wallet, self._netuid, address.ip, address.port)
        except Refused as error:
            if error.code != "rate_limited":  # somebody else with this hotkey was faster
                raise
            return False
        _log.info("axon published", extra={"axon": address, "address_from": address.source})
        return True

    def _say(self, message: str) -> None:
        """An error in the log, but not every minute."""
        now = asyncio.get_running_loop().time()
        self._told_at = {text: at for text, at in self._told_at.items() if now - at < TELL_AGAIN_S}
        if message not in self._told_at:
            self._told_at[message] = now
            _log.error(message)


def _text(state: AxonState) -> str:
    return "no axon" if state.shown is None else f"{state.shown[0]}:{state.shown[1]}"
