"""A whole subnet on this machine: `with LocalSubnet(miners=4) as subnet:`.

Embedded chain, validator and miners as real OS processes with throw-away wallets and free ports,
for tests and demonstrations. Knows how they are started, found ready and stopped; what they do is
their own business.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mapreduce.errors import InvalidArgument, JobClosed
from mapreduce.processes import ChildProcess, spawn, stop_all
from mapreduce.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import bittensor as bt

    from peer import Peer

Result = TypeVar("Result")

NETUID = 10
READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 5.0
VALIDATOR_STAKE_TAO = 1000.0
DEFAULT_BANDWIDTH = 1 << 30
LIARS = "test.liars"
_WALLET = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a neuron runs: `prefix` goes before its command line, `ip` and `port` are what it
    listens on (port 0: any free one), `flags` are further flags for it alone."""

    prefix: tuple[str, ...] = ()
    ip: str = "127.0.0.1"
    port: int = 0
    flags: tuple[str, ...] = ()


def _check_faults(faults: Mapping[str, str], miners: int) -> None:
    if not faults:
        return
    try:
        known = importlib.import_module(LIARS).FAULTS
    except ImportError:
        raise InvalidArgument(
            "faults are told by test/liars, which the installed package does not contain: run it "
            "in a checkout of the repository"
        ) from None
    for name, fault in faults.items():
        role, _, number = name.partition("-")
        counts = number.isdecimal() and int(number) >= 1
        if (
            not counts
            or role not in ("miner", "peer")
            or (role == "miner" and int(number) > miners)
        ):
            raise InvalidArgument(f"faults: there is no {name!r}")
        if fault not in known or known[fault].by != role:
            names = ", ".join(sorted(key for key, value in known.items() if value.by == role))
            raise InvalidArgument(f"faults: a {role} cannot do {fault!r}; it can do {names}")


class LocalSubnet:
    """An embedded chain with one validator and `miners` miners, each a process of its own.

    Args:
        miners: how many.
        directory: where chain, wallets and logs go; a temporary one, removed at the end, by
        default. block_time_s: of the embedded chain. validator_flags: further flags for
        `neurons/validator.py`. miner_flags: further flags for each `neurons/miner.py`. faults: who
        lies, and how: "miner-1", "miner-2", .. or "peer-1", .. (a rank of `run`) to a fault that
        `test/liars` names; only in a checkout of the repository.

    Raises:
        InvalidArgument: a count, a name or a fault that does not exist.
        ProcessDied: a process ended before it was ready; shows its last lines.
    """

    def __init__(
        self,
        miners: int = 4,
        *,
        directory: str | os.PathLike[str] | None = None,
        block_time_s: float = 0.25,
        validator_flags: Sequence[str] = (),
        miner_flags: Sequence[str] = (),
        faults: Mapping[str, str] | None = None,
    ) -> None:
        if miners < 0:
            raise InvalidArgument(f"miners = {miners}: 0 or more")
        self.faults = dict(faults or {})
        _check_faults(self.faults, miners)
        self.miner_count = miners
        self.netuid = NETUID
        self.validator: ChildProcess | None = None
        self.miners: list[ChildProcess] = []
        self.validator_uid = -1
        self._keep = directory is not None
        self._given = directory
        self._directory: Path | None = None
        self._block_time_s = block_time_s
        self._validator_flags = tuple(validator_flags)
        self._miner_flags = tuple(miner_flags)

    # Life ---------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything and returns when validator and miners are ready."""
        self._directory = Path(self._given or tempfile.mkdtemp(prefix="mapreduce-")).absolute()
        try:
            names = ["validator", *(f"miner-{i + 1}" for i in range(self.miner_count))]
            uids = asyncio.run(self._prepare_chain(names))
            self.validator_uid = uids[0]
            self.validator = self._spawn("validator", names[0], self._validator_flags)
            for name in names[1:]:
                self.miners.append(self._spawn("miner", name, self._miner_flags))
            self._wait_ready([self.validator, *self.miners], uids)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops every process and removes what is temporary. Idempotent."""
        children = [child for child in (*self.miners, self.validator) if child is not None]
        self.miners, self.validator = [], None
        stop_all(children, STOP_GRACE_S)
        if self._directory is not None and not self._keep:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None

    @property
    def directory(self) -> Path:
        """Where chain, wallets and logs are."""
        if self._directory is None:
            raise JobClosed("the subnet is not running")
        return self._directory

    @property
    def state_path(self) -> Path:
        """The validator's state: proofs, disputes, jobs."""
        return self.directory / "validator.sqlite"

    @property
    def network(self) -> str:
        """What to give as `--subtensor.network` or `Peer(network=...)`."""
        return f"embedded:{self.directory / 'chain.sqlite'}"

    def wallet(self, hotkey: str = "peer") -> bt.Wallet:
        """A throw-away wallet of this subnet; `peer` belongs to nobody who is registered."""
        from mapreduce.chain.wallets import load_wallet

        return load_wallet(_WALLET, hotkey, str(self.directory / "wallets"))

    def check(self) -> None:
        """Raises ProcessDied, with its last lines, if a neuron has ended."""
        for child in (self.validator, *self.miners):
            if child is not None:
                child.check_alive()

    async def _prepare_chain(self, names: list[str]) -> list[int]:
        """Makes the chain and a registered hotkey per name; stakes on the first.

        Returns the uids.
        """
        from mapreduce.chain import open_chain
        from mapreduce.chain.actions import add_stake, register_hotkey
        from mapreduce.chain.embedded import create_chain
        from mapreduce.chain.wallets import create_wallet

        wallets = str(self.directory / "wallets")
        create_chain(self.directory / "chain.sqlite", block_time_s=self._block_time_s)
        create_wallet(wallets, _WALLET, "peer")
        uids = []
        async with open_chain(self.network) as client:
            for name in names:
                wallet = create_wallet(wallets, _WALLET, name)
                uids.append(await register_hotkey(client, wallet, NETUID))
                if name == "validator":
                    await add_stake(client, wallet, NETUID, VALIDATOR_STAKE_TAO)
        return uids

    def place(self, name: str) -> Place:
        """Where the neuron `name` runs; for subclasses that put each into a network of its own."""
        return Place()

    def program(self, role: str, name: str) -> tuple[str, ...]:
        """What Python runs as this neuron, for subclasses that run something else."""
        fault = self.faults.get(name)
        return ("-m", f"neurons.{role}") if fault is None else ("-m", f"{LIARS}.miners", fault)

    def _spawn(self, role: str, name: str, flags: Sequence[str]) -> ChildProcess:
        place = self.place(name)
        argv = [
            *place.prefix,
            sys.executable,
            *self.program(role, name),
            *("--subtensor.network", self.network),
            *("--netuid", str(NETUID)),
            *("--wallet.name", _WALLET),
            *("--wallet.hotkey", name),
            *("--wallet.path", str(self.directory / "wallets")),
            *("--axon.ip", place.ip),
            *("--axon.port", str(place.port)),
            *(("--validator.state", str(self.state_path)) if role == "validator" else ()),
            *place.flags,
            *flags,
        ]
        # The caller's BT_* variables and configuration file are none of this subnet's.
        env = {key: value for key, value in os.environ.items() if not key.startswith("BT_")}
        log_path = self.directory / f"{name}.log"
        return spawn(name, argv, env=env, log_path=log_path)

    def _wait_ready(self, children: Sequence[ChildProcess], uids: Sequence[int]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        for child, uid in zip(children, uids, strict=True):
            child.wait_ready(partial(self._answers, uid), max(0.1, deadline - time.monotonic()))

    def _answers(self, uid: int) -> bool:
        ip, port = self.axon(uid)
        if ip is None:
            return False
        try:
            with urllib.request.urlopen(f"http://{ip}:{port}/readyz", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def axon(self, uid: int) -> tuple[str | None, int | None]:
        """Where a neuron of this subnet listens, as its chain says; (None, None) if it serves
        nothing."""
        from mapreduce.chain import open_chain
        from mapreduce.chain.metagraph import fetch_metagraph

        async def read() -> tuple[str | None, int | None]:
            async with open_chain(self.network) as client:
                neuron = (await fetch_metagraph(client, NETUID)).by_uid(uid)
                return (None, None) if neuron is None else (neuron.ip, neuron.port)

        return asyncio.run(read())

    # Peers --------------------------------------------------------------------------------------

    def peer(
        self, rank: int, peer_count: int, bandwidth: int = DEFAULT_BANDWIDTH, **options: Any
    ) -> Peer:
        """A `Peer` of this subnet, not yet initialised; `options` are its keyword arguments."""
        from peer import Peer

        return Peer(
            rank,
            peer_count,
            bandwidth,
            self.wallet(),
            self.validator_uid,
            self.netuid,
            self.network,
            **options,
        )

    def run(
        self,
        fn: Callable[[Peer], Result],
        peer_count: int,
        bandwidth: int = DEFAULT_BANDWIDTH,
        *,
        timeout_s: float = 600.0,
        **options: Any,
    ) -> list[Result]:
        """Runs `fn(peer)` in one process per rank, each with an open Peer; returns results in rank
        order.

        `fn` must be a function of a module, and its result picklable.

        Raises:
            Exception: what `fn` raised, of the first rank that failed.
            RankFailed: a process died, or did not end within `timeout_s`.
        """
        subnet = self._connection()
        arguments = [
            (fn, rank, peer_count, bandwidth, options, subnet) for rank in range(1, peer_count + 1)
        ]
        return run_ranks(_run_peer, arguments, timeout_s)

    def _connection(self) -> dict[str, Any]:
        """What a rank's process needs to reach this subnet."""
        return {
            "network": self.network,
            "netuid": self.netuid,
            "validator_uid": self.validator_uid,
            "wallets": str(self.directory / "wallets"),
            "faults": self.faults,
        }


def _run_peer(
    fn: Callable[[Peer], Result],
    rank: int,
    peer_count: int,
    bandwidth: int,
    options: dict[str, Any],
    subnet: dict[str, Any],
) -> Result:
    """What a rank's process does."""
    from mapreduce.chain.wallets import load_wallet
    from peer import Peer

    wallet = load_wallet(_WALLET, "peer", subnet["wallets"])
    fault = subnet["faults"].get(f"peer-{rank}")
    if fault is not None:
        importlib.import_module(f"{LIARS}.peers").install(fault)
    place = (wallet, subnet["validator_uid"], subnet["netuid"], subnet["network"])
    with Peer(rank, peer_count, bandwidth, *place, **options) as peer:
        return fn(peer)
