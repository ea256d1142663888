"""What miners and validators share: wallet, chain, the served axon, readiness and a clean stop.

Knows no route.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mapreduce import __version__
from mapreduce.chain import is_embedded
from mapreduce.chain.metagraph import (
    Metagraph,
    fetch_metagraph,
    register_command,
    require_registered,
    serve_axon,
)
from mapreduce.chain.seam import connected
from mapreduce.chain.wallets import load_wallet
from mapreduce.errors import ChainStalled, ConfigError, Unavailable
from mapreduce.net.listener import listen
from mapreduce.net.server import start_server
from mapreduce.services.watchdog import watched
from mapreduce.services.worker import Worker, supervised

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import bittensor as bt
    from aiohttp import web
    from bittensor.sp_core import Keypair

    from mapreduce.config import AxonConfig, ChainConfig, WalletConfig
    from mapreduce.services.worker import Duty

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
        chain, wallet = self._chain, self._wallet
        hint = register_command(
            chain.network,
            chain.netuid,
            wallet.name,
            wallet.hotkey_str,
            wallet_path=wallet.path,
            endpoint=chain.endpoint,
        )
        return await require_registered(self.client, chain.netuid, self.hotkey, hint)

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
        worker = Worker.from_environment()
        listener = None if worker is None else worker.listener
        runner = await start_server(app, listener or listen(axon.ip, axon.port))
        try:
            async with watched(self.client, stall):
                port = runner.addresses[0][1]
                ip, external_port = await self._external_address(axon, port)
                await serve_axon(self.client, self._wallet, self._chain.netuid, ip, external_port)
                self._not_ready = None
                _log.info(
                    f"{self.role} is ready",
                    extra={
                        "uid": uid,
                        "hotkey": self.hotkey,
                        "listen": f"{axon.ip}:{port}",
                        "axon": f"{ip}:{external_port}",
                        "version": __version__,
                    },
                )
                async with supervised(worker, self.duties, stop.set, state):
                    await stop.wait()
            self._not_ready = "stopping"
            _log.info(f"{self.role} is stopping")
        finally:
            await runner.cleanup()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        if stalled:
            raise ChainStalled(stalled[0])

    async def _external_address(self, axon: AxonConfig, port: int) -> tuple[str, int]:
        """What to publish: the flags, the address listened on, or what the chain shows already."""
        external_port = axon.external_port or port
        if axon.external_ip is not None:
            return axon.external_ip, external_port
        if not ipaddress.ip_address(axon.ip).is_unspecified:
            return axon.ip, external_port
        if is_embedded(self._chain.network):
            return "127.0.0.1", external_port
        metagraph = await fetch_metagraph(self.client, self._chain.netuid)
        neuron = metagraph.by_hotkey(self.hotkey)
        if neuron is not None and neuron.ip is not None:
            return neuron.ip, external_port
        raise ConfigError(
            f"listening on {axon.ip}, which nobody can dial, and the chain shows no address of "
            "this hotkey yet: give the public one with --axon.external_ip"
        )
