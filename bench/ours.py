"""Our own collectives on a started subnet: one process per rank, as users run them."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # ships no types

from bench.steps import time_steps
from mapreduce.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from bench.lab import Host
    from bench.steps import Case
    from bench.subnets import PlacedSubnet

TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a job took that ran one case or several.

    `seconds` are per case, rank and step. `init_s` goes from the last rank's call of
    `init_process_group` to its last return. CPU seconds are per GB of tensors that a process
    carried: a peer every byte once each way, a miner what the peers sent it. Peaks are bytes beyond
    what a process held before the job, of the largest process.
    """

    seconds: list[list[list[float]]]
    init_s: float
    peer_cpu_s_per_GB: float
    miner_cpu_s_per_GB: float
    peer_peak_bytes: int
    miner_peak_bytes: int


def measure(subnet: PlacedSubnet, hosts: Sequence[Host], cases: Sequence[Case]) -> Run:
    """Runs the cases one after the other in one job, with a rank on each of `hosts`."""
    miners = [psutil.Process(child.pid) for child in subnet.miners]
    idle = [_reset_peak(process.pid) for process in miners]
    before = sum(_cpu_s(process) for process in miners)
    place = _Place(
        str(subnet.directory / "wallets"),
        subnet.validator_uid,
        subnet.netuid,
        subnet.network,
        subnet.verified,
    )
    arguments = [(tuple(cases), host, rank, place) for rank, host in enumerate(hosts)]
    ranks = run_ranks(_rank, arguments, TIMEOUT_S)
    # One more step than is timed: `time_steps` checks it.
    carried = sum(case.nbytes * (case.timed_steps + 1) for case in cases) / 1e9 * len(ranks)
    miners_cpu_s = sum(_cpu_s(process) for process in miners) - before
    peaks = [_peak(process.pid) - start for process, start in zip(miners, idle, strict=True)]
    return Run(
        seconds=[list(case) for case in zip(*(rank.seconds for rank in ranks), strict=True)],
        init_s=max(rank.opened_at for rank in ranks) - max(rank.called_at for rank in ranks),
        peer_cpu_s_per_GB=sum(rank.cpu_s for rank in ranks) / carried,
        miner_cpu_s_per_GB=miners_cpu_s / carried,
        peer_peak_bytes=max(rank.peak_bytes for rank in ranks),
        miner_peak_bytes=max(peaks),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What a rank's process needs to reach the subnet."""

    wallets: str
    validator_uid: int
    netuid: int
    network: str
    verified: bool


@dataclass(frozen=True, slots=True)
class _Rank:
    seconds: list[list[float]]
    called_at: float
    opened_at: float
    cpu_s: float
    peak_bytes: int


def _rank(cases: tuple[Case, ...], host: Host, rank: int, place: _Place) -> _Rank:
    host.enter()
    # Imports take a second or two; they are no part of what is measured.
    import torch  # noqa: F401

    from mapreduce.chain.wallets import load_wallet
    from peer import Peer

    if not place.verified:
        from bench.unverified import neither_hash_nor_sign

        neither_hash_nor_sign()
    peer = Peer(
        rank + 1,
        cases[0].peers,
        max(case.nbytes for case in cases),
        load_wallet("local", "peer", place.wallets),
        place.validator_uid,
        place.netuid,
        place.network,
        miner_count=cases[0].miners,
    )
    idle = _reset_peak("self")
    called_at = time.monotonic()
    peer.init_process_group()
    opened_at = time.monotonic()
    cpu_s = 0.0

    def run(case: Case) -> list[float]:
        def collective(tensor: torch.Tensor) -> None:
            nonlocal cpu_s
            before = _own_cpu_s()
            if case.broadcast:
                peer.broadcast(tensor)
            else:
                peer.all_reduce(tensor, op="sum")
            cpu_s += _own_cpu_s() - before

        return time_steps(case, rank, collective)

    seconds = [run(case) for case in cases]
    peak = _peak("self") - idle
    peer.destroy_process_group()
    return _Rank(seconds, called_at, opened_at, cpu_s, peak)


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _reset_peak(pid: int | str) -> int:
    """Begins a new measurement of a process's peak memory; returns what it holds now, bytes."""
    with open(f"/proc/{pid}/clear_refs", "w") as handle:
        handle.write("5")
    return _peak(pid)


def _peak(pid: int | str) -> int:
    with open(f"/proc/{pid}/status") as handle:
        for line in handle:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no VmHWM of process {pid}")
