"""The axon of a hotkey: what the chain shows, when it may be published again, publishing it.

Knows the chain's storage and its limit; knows nothing of which address is the right one.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bittensor as bt

from mapreduce.chain.metagraph import RETRIES
from mapreduce.chain.seam import reading, require_success, writing
from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    from mapreduce.chain.wallets import Keys

Endpoint = tuple[str, int]
"""An IP address in its normal form, and a port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonState:
    """What the chain says of a hotkey's axon, read at about one moment. `wait_blocks` is how long
    the chain will refuse another one: 0, not at all."""

    registered: bool
    shown: Endpoint | None
    wait_blocks: int
    block_time_s: float

    @property
    def wait_s(self) -> float:
        """`wait_blocks` in seconds."""
        return self.wait_blocks * self.block_time_s


async def read_axon(client: bt.Client, netuid: int, hotkey: str) -> AxonState:
    """What the chain shows. Raises ChainUnavailable."""
    storage = bt.storage.SubtensorModule
    with reading(client, f"reading the axon of {hotkey} on netuid {netuid}"):
        view = await client.at()
        uid, axon, limit, block_time_s = await asyncio.gather(
            view.query(storage.Uids, [netuid, hotkey]),
            view.query(storage.Axons, [netuid, hotkey]),
            view.query(storage.ServingRateLimit, [netuid]),
            view.block_time(),
        )
    served_at = int(axon["block"]) if axon else 0
    wait = served_at + int(limit or 0) - int(view.block) if served_at else 0
    return AxonState(
        registered=uid is not None,
        shown=_endpoint(axon) if axon else None,
        wait_blocks=max(0, wait),
        block_time_s=float(block_time_s),
    )


def _endpoint(axon: dict[str, Any]) -> Endpoint | None:
    """The chain's own form, numbers for everything; 0 stands for nothing."""
    number, port = int(axon["ip"]), int(axon["port"])
    if not number or not port:
        return None
    of_family = ipaddress.IPv6Address if int(axon["ip_type"]) == 6 else ipaddress.IPv4Address
    try:
        return str(of_family(number)), port
    except ValueError:
        return None


async def serve_axon(client: bt.Client, wallet: Keys, netuid: int, ip: str, port: int) -> bool:
    """Publish where the wallet's hotkey listens, unless the chain already says so.

    Chains limit how often an axon may be published, so a restart must not spend the allowance.

    Returns:
        Whether anything was published.

    Raises:
        ConfigError: the address is none.
        Refused: the chain refuses; the message says why and what helps.
        ChainUnavailable: no answer.
    """
    try:
        address = str(ipaddress.ip_address(ip))
    except ValueError as error:
        raise ConfigError(f"axon.external_ip = {ip!r} is no IP address") from error
    state = await read_axon(client, netuid, wallet.hotkey.ss58_address)
    if state.shown == (address, port):
        return False
    what = f"publishing the axon {address}:{port} on netuid {netuid}"
    intent = bt.ServeAxon(netuid=netuid, ip=address, port=port)
    with writing(client, what):
        # The key itself, not the wallet, from which the SDK would read and unlock it once more.
        require_success(await client.execute(intent, wallet.hotkey, retries=RETRIES), what)
    return True
