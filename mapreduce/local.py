"""A whole subnet on this machine: `with LocalSubnet(miners=4) as subnet:`.

Embedded chain, validator, miners and benchmark bots as real OS processes with throw-away wallets
and free ports, for tests and demonstrations. Knows how they are started, found ready and stopped;
what they do is their own business.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mapreduce.errors import InvalidArgument, JobClosed, Unavailable
from mapreduce.local_chain import NETUID, WALLET, WALLETS, ChainTerms, network_of, prepare_chain
from mapreduce.local_checkout import (
    become_liar,
    check_faults,
    check_limits,
    lying_miner,
    open_link,
)
from mapreduce.processes import ChildProcess, free_port, spawn, stop_all
from mapreduce.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import bittensor as bt

    from mapreduce.chain.metagraph import Metagraph
    from peer import Peer

Result = TypeVar("Result")

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 5.0
POLL_INTERVAL_S = 0.1
DEFAULT_BANDWIDTH = 1 << 30
IP = "127.0.0.1"
STRICT_IP = "127.0.0.2"  # the rules of a real chain refuse 127.0.0.1

__all__ = ["NETUID", "LocalSubnet", "Place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a neuron runs: `prefix` goes before its command line, `ip` and `port` are what it
    listens on (port 0: any free one), `flags` are further flags for it alone."""

    prefix: tuple[str, ...] = ()
    ip: str = IP
    port: int = 0
    flags: tuple[str, ...] = ()


class LocalSubnet:
    """An embedded chain with one validator, `miners` miners and `bots` benchmark bots, each a
    process of its own; each miner belongs to another coldkey.

    Args:
        miners: how many.
        bots: how many benchmark bots work for the validator. strict: a chain with the rules of a
        real one; everything listens on 127.0.0.2 then, and the start lasts until the validator's
        permit. tempo: blocks from epoch to epoch. block_time_s: of the embedded chain.
        directory: where chain, wallets and logs go; a temporary one, removed at the end, by
        default. validator_flags: further flags for `neurons/validator.py`. miner_flags: further
        flags for each `neurons/miner.py`. bot_flags: further flags for each `neurons/benchmark.py`.
        limits: "miner-1", "miner-2", .. to bits per second, which the miner's link carries in each
        direction. faults: who lies, and how: "miner-1", .. or "peer-1", .. (a rank of `run`) to a
        fault that `test/liars` names. Both only in a checkout of the repository.

    Raises:
        InvalidArgument: a count, a name, a rate or a fault that does not exist.
        ProcessDied: a process ended before it was ready; shows its last lines.
        Unavailable: the chain has given the validator no permit.
    """

    def __init__(
        self,
        miners: int = 4,
        *,
        bots: int = 0,
        strict: bool = False,
        tempo: int = 360,
        block_time_s: float = 0.25,
        directory: str | os.PathLike[str] | None = None,
        validator_flags: Sequence[str] = (),
        miner_flags: Sequence[str] = (),
        bot_flags: Sequence[str] = (),
        limits: Mapping[str, float] | None = None,
        faults: Mapping[str, str] | None = None,
    ) -> None:
        for what, count in (("miners", miners), ("bots", bots)):
            if count < 0:
                raise InvalidArgument(f"{what} = {count}: 0 or more")
        self.limits = dict(limits or {})
        self.faults = dict(faults or {})
        check_limits(self.limits, miners)
        check_faults(self.faults, miners)
        self.miner_count = miners
        self.bot_count = bots
        self.netuid = NETUID
        self.validator: ChildProcess | None = None
        self.miners: list[ChildProcess] = []
        self.bots: list[ChildProcess] = []
        self.validator_uid = -1
        self.miner_uids: list[int] = []
        self._links: list[ChildProcess] = []
        self._keep = directory is not None
        self._given = directory
        self._directory: Path | None = None
        self._terms = ChainTerms(block_time_s=block_time_s, strict=strict, tempo=tempo)
        self._validator_flags = tuple(validator_flags)
        self._miner_flags = tuple(miner_flags)
        self._bot_flags = tuple(bot_flags)
        self._bot_hotkeys: tuple[str, ...] = ()

    # Life ---------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything and returns when validator and miners are ready, and the bots run."""
        self._directory = Path(self._given or tempfile.mkdtemp(prefix="mapreduce-")).absolute()
        try:
            miners = _numbered("miner", self.miner_count)
            bots = _numbered("bot", self.bot_count)
            wallets = {name: self._wallet_name(name) for name in ("validator", *miners)}
            uids, bot_hotkeys = asyncio.run(
                prepare_chain(self._directory, self._terms, wallets, ["peer", *bots])
            )
            self.validator_uid, *self.miner_uids = uids
            self._start_neurons(miners, bot_hotkeys[1:])
            self._wait_for_permit()
            uid = ("--validator.uid", str(self.validator_uid))
            for name in bots:
                self.bots.append(self._spawn("benchmark", name, (*uid, *self._bot_flags)))
            self.check()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops every process and removes what is temporary. Idempotent."""
        neurons = [child for child in (*self.miners, self.validator) if child is not None]
        bots, links = self.bots, self._links
        self.bots, self.miners, self.validator, self._links = [], [], None, []
        for children in (bots, neurons, links):  # from those that speak to those that listen
            stop_all(children, STOP_GRACE_S)
        if self._directory is not None and not self._keep:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None

    def restart_validator(self) -> None:
        """Ends the validator if it still runs, starts it again with its flags, port and state, and
        returns when it is ready. Before, `validator.kill()` ends it as a crash would."""
        if self.validator is None:
            raise JobClosed("the subnet is not running")
        self.validator.stop(STOP_GRACE_S)
        _, port = self.axon(self.validator_uid)  # where its bots look for it
        self.validator = self._start_validator(port or 0)
        self.validator.wait_ready(partial(self._answers, self.validator_uid), READY_TIMEOUT_S)

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
        return network_of(self.directory)

    def wallet(self, hotkey: str = "peer") -> bt.Wallet:
        """A throw-away wallet of this subnet; `peer` belongs to nobody who is registered."""
        from mapreduce.chain.wallets import load_wallet

        return load_wallet(self._wallet_name(hotkey), hotkey, str(self.directory / WALLETS))

    def check(self) -> None:
        """Raises ProcessDied, with its last lines, if one of the processes has ended."""
        for child in (self.validator, *self.miners, *self.bots, *self._links):
            if child is not None:
                child.check_alive()

    def _wallet_name(self, name: str) -> str:
        return name if name.startswith("miner-") else WALLET

    def place(self, name: str) -> Place:
        """Where the neuron `name` runs; for subclasses that put each into a network of its own."""
        return Place(ip=STRICT_IP if self._terms.strict else IP)

    def program(self, role: str, name: str) -> tuple[str, ...]:
        """What Python runs as this neuron, for subclasses that run something else."""
        fault = self.faults.get(name)
        return ("-m", f"neurons.{role}") if fault is None else lying_miner(fault)

    def _start_neurons(self, miners: Sequence[str], bot_hotkeys: Sequence[str]) -> None:
        """Starts validator and miners, and waits until they answer."""
        self._bot_hotkeys = tuple(bot_hotkeys)
        self.validator = self._start_validator()
        for name in miners:
            self.miners.append(self._serving("miner", name, self._miner_flags))
        deadline = time.monotonic() + READY_TIMEOUT_S
        uids = (self.validator_uid, *self.miner_uids)
        for child, uid in zip((self.validator, *self.miners), uids, strict=True):
            child.wait_ready(partial(self._answers, uid), max(0.1, deadline - time.monotonic()))

    def _start_validator(self, port: int = 0) -> ChildProcess:
        flags = ["--validator.state", str(self.state_path)]
        if self._bot_hotkeys:
            flags += ["--benchmark_hotkeys", ",".join(self._bot_hotkeys)]
        return self._serving("validator", "validator", (*flags, *self._validator_flags), port)

    def _serving(self, role: str, name: str, flags: Sequence[str], port: int = 0) -> ChildProcess:
        """Starts what listens, behind its link if it has one; `port` goes before its place's."""
        place = self.place(name)
        place = replace(place, port=port or place.port)
        if name in self.limits:
            place = self._behind_link(name, place)
        axon = ("--axon.ip", place.ip, "--axon.port", str(place.port))
        return self._spawn(role, name, (*axon, *place.flags, *flags))

    def _behind_link(self, name: str, place: Place) -> Place:
        """Starts the link of a limited miner; where the miner listens, and what it publishes."""
        port = place.port or free_port(place.ip)
        log, rate = self.directory / f"{name}.link.log", self.limits[name]
        link, published = open_link(f"link of {name}", place.prefix, place.ip, port, rate, log)
        self._links.append(link)
        external = ("--axon.external_ip", place.ip, "--axon.external_port", str(published))
        return replace(place, port=port, flags=(*place.flags, *external))

    def _spawn(self, role: str, name: str, flags: Sequence[str]) -> ChildProcess:
        argv = [
            *self.place(name).prefix,
            sys.executable,
            *self.program(role, name),
            *("--subtensor.network", self.network),
            *("--netuid", str(NETUID)),
            *("--wallet.name", self._wallet_name(name)),
            *("--wallet.hotkey", name),
            *("--wallet.path", str(self.directory / WALLETS)),
            *flags,
        ]
        # The caller's BT_* variables and configuration file are none of this subnet's.
        env = {key: value for key, value in os.environ.items() if not key.startswith("BT_")}
        log_path = self.directory / f"{name}.log"
        return spawn(name, argv, env=env, log_path=log_path)

    def _answers(self, uid: int) -> bool:
        ip, port = self.axon(uid)
        if ip is None:
            return False
        try:
            with urllib.request.urlopen(f"http://{ip}:{port}/readyz", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _wait_for_permit(self) -> None:
        """Without it no miner serves the validator's jobs."""
        deadline = time.monotonic() + self._terms.permit_timeout_s
        while True:
            metagraph = self.metagraph()
            neuron = metagraph.by_uid(self.validator_uid)
            if neuron is not None and neuron.validator_permit:
                return
            self.check()
            if time.monotonic() > deadline:
                stake = "not registered" if neuron is None else f"{neuron.stake_tao:g} TAO staked"
                raise Unavailable(
                    f"the chain has given the validator no permit by block {metagraph.block}, with "
                    f"{stake} and an epoch every {self._terms.tempo} blocks"
                )
            time.sleep(POLL_INTERVAL_S)

    def metagraph(self) -> Metagraph:
        """The neurons of this subnet, as its chain says."""
        from mapreduce.chain import open_chain
        from mapreduce.chain.metagraph import fetch_metagraph

        async def read() -> Metagraph:
            async with open_chain(self.network) as client:
                return await fetch_metagraph(client, NETUID)

        return asyncio.run(read())

    def axon(self, uid: int) -> tuple[str | None, int | None]:
        """Where a neuron of this subnet listens, as its chain says; (None, None) if it serves
        nothing."""
        neuron = self.metagraph().by_uid(uid)
        return (None, None) if neuron is None else (neuron.ip, neuron.port)

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
            "wallets": str(self.directory / WALLETS),
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

    wallet = load_wallet(WALLET, "peer", subnet["wallets"])
    fault = subnet["faults"].get(f"peer-{rank}")
    if fault is not None:
        become_liar(fault)
    place = (wallet, subnet["validator_uid"], subnet["netuid"], subnet["network"])
    with Peer(rank, peer_count, bandwidth, *place, **options) as peer:
        return fn(peer)


def _numbered(role: str, count: int) -> list[str]:
    return [f"{role}-{number}" for number in range(1, count + 1)]
