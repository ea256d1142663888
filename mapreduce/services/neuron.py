"""What miners and validators share: wallet, chain, the served axon, readiness and a clean stop.

Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mapreduce import __version__
from mapreduce.chain import is_embedded
from mapreduce.chain.metagraph import (
    Metagraph,
    fetch_metagraph,
    register_command,
    require_registered,
)
from mapreduce.chain.seam import connected
from mapreduce.chain.wallets import load_wallet
from mapreduce.errors import ChainStalled, Unavailable
from mapreduce.net.client import make_http_session
from mapreduce.net.listener import listen
from mapreduce.net.server import start_server
from mapreduce.services.axon import AxonUpkeep
from mapreduce.services.dial import watch_reach
from mapreduce.services.watchdog import watched
from mapreduce.services.worker import Worker, supervised

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    import bittensor as bt
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.config import AxonConfig, ChainConfig, WalletConfig
    from mapreduce.services.axon import Address
    from mapreduce.services.worker import Duty

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

METAGRAPH_AGE_S = 30.0  # public endpoints allow about one request a second
MISS_AGE_S = 2.0  # a stranger may just have registered: look again, but not for every request


class Directory:
    """The metagraph, no older than it needs to be.

    Keeps the last one while the chain does not answer.
    """

    def __init__(self, client: bt.Client, netuid: int) -> None:
        self._client = client
        self._netuid = netuid
        self._metagraph: Metagraph | None = None
        self._read_at = 0.0
        self._lock = asyncio.Lock()

    async def metagraph(self, max_age_s: float = METAGRAPH_AGE_S) -> Metagraph:
        """The subnet's neurons. Raises Unavailable if there never was an answer."""
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if self._metagraph is None or now - self._read_at > max_age_s:
                try:
                    self._metagraph = await fetch_metagraph(self._client, self._netuid)
                    self._read_at = now
                except Unavailable as error:
                    if self._metagraph is None:
                        raise
                    _log.warning("using an old metagraph", extra={"error": str(error)})
            return self._metagraph

    async def is_validator(self, hotkey: str) -> bool:
        """Whether the hotkey holds a validator permit."""
        for max_age_s in (METAGRAPH_AGE_S, MISS_AGE_S):
            neuron = (await self.metagraph(max_age_s)).by_hotkey(hotkey)
            if neuron is not None and neuron.validator_permit:
                return True
        return False


class Neuron:
    """One registered hotkey at work on one chain."""

    def __init__(self, client: bt.Client, chain: ChainConfig, wallet: bt.Wallet, role: str) -> None:
        self.client = client
        self.key: Keypair = wallet.hotkey
        self.hotkey: str = self.key.ss58_address
        self.role = role
        self.duties: list[Duty] = []
        self.directory = Directory(client, chain.netuid)
        self._chain = chain
        self._wallet = wallet
        self._not_ready: str | None = "starting"

    @classmethod
    @asynccontextmanager
    async def open(
        cls, chain: ChainConfig, wallet: WalletConfig, role: str
    ) -> AsyncIterator[Neuron]:
        """Loads the wallet and connects to the chain.

        Raises WalletError, ConfigError, Unavailable.
        """
        loaded = load_wallet(wallet.name, wallet.hotkey, wallet.path)
        async with connected(chain.network, chain.endpoint) as client:
            yield cls(client, chain, loaded, role)

    def not_ready(self) -> str | None:
        """Why this neuron does not serve yet, None once it does."""
        return self._not_ready

    async def require_uid(self) -> int:
        """This hotkey's uid. Raises NotRegistered with the command that registers it."""
        netuid, hint = self._chain.netuid, self._register_hint()
        return await require_registered(self.client, netuid, self.hotkey, hint)

    def _register_hint(self) -> str:
        chain, wallet = self._chain, self._wallet
        return register_command(
            chain.network,
            chain.netuid,
            wallet.name,
            wallet.hotkey_str,
            wallet_path=wallet.path,
            endpoint=chain.endpoint,
        )

    async def serve(
        self, app: web.Application, axon: AxonConfig, uid: int, *, state: Path | None = None
    ) -> None:
        """Listens, publishes the axon, and returns after SIGINT or SIGTERM, everything closed.
        `state` is the file that this neuron keeps, for its supervisor.

        Raises ChainStalled, everything closed as well, if there are no new blocks.
        """
        stop = asyncio.Event()
        stalled: list[str] = []

        def stall(reason: str) -> None:
            stalled.append(reason)
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        for duty in self.duties:
            duty.draining = True  # no work before it is ready: a bad release may have to go again
        worker = Worker.from_environment()
        listener = None if worker is None else worker.listener
        runner = await start_server(app, listener or listen(axon.ip, axon.port))
        try:
            async with watched(self.client, stall):
                port = runner.addresses[0][1]
                upkeep = self._upkeep(axon, port)
                address = await _unless(stop, upkeep.publish())
                if address is not None:
                    self._not_ready = None
                    for duty in self.duties:
                        duty.draining = False
                    _log.info(
                        f"{self.role} is ready",
                        extra={
                            "uid": uid,
                            "hotkey": self.hotkey,
                            "listen": f"{axon.ip}:{port}",
                            "axon": address,
                            "address_from": address.source,
                            "version": __version__,
                        },
                    )
                    async with (
                        supervised(worker, self.duties, stop.set, state),
                        self._reachable(upkeep, address),
                    ):
                        await stop.wait()
            self._not_ready = "stopping"
            _log.info(f"{self.role} is stopping")
        finally:
            # The signals stay handled until the loop is closed: a second SIGTERM, as systemd and a
            # supervisor send it together, must not end the process before its files are closed.
            await runner.cleanup()
        if stalled:
            raise ChainStalled(stalled[0])

    def _upkeep(self, axon: AxonConfig, port: int) -> AxonUpkeep:
        def tell(reason: str | None) -> None:
            self._not_ready = reason

        return AxonUpkeep(
            self.client,
            self._wallet,
            self._chain.netuid,
            axon,
            port,
            one_machine=is_embedded(self._chain.network),
            register_hint=self._register_hint(),
            tell=tell,
        )

    @asynccontextmanager
    async def _reachable(self, upkeep: AxonUpkeep, address: Address) -> AsyncIterator[None]:
        """Keeps the axon on the chain, and has others try it, while the context lasts."""
        async with make_http_session() as http:
            tasks = [
                asyncio.create_task(upkeep.keep()),
                asyncio.create_task(watch_reach(self.key, self.directory, http, address)),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns; None if `stop` comes first. Raises what it raises."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait([working, stopping])
