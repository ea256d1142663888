"""Other ways to do the same collective on the same hosts: gloo, the original's path, hivemind.

Each returns the seconds per rank and step, warm-up included (hivemind's are left out already).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.steps import RENEWED_EVERY, check, contribution, fill, outcome, time_steps
from mapreduce.processes import free_port, spawn
from mapreduce.ranks import run_ranks

if TYPE_CHECKING:
    import torch

    from bench.lab import Host, Site
    from bench.steps import Case

TIMEOUT_S = 1200.0
ROOT = Path(__file__).parent.parent
HIVEMIND = ROOT / ".venv-hivemind" / "bin" / "python"
HIVEMIND_GRACE_S = 20.0  # to end its daemons


@dataclass(frozen=True, slots=True)
class World:
    """A gloo world: where its store is, and who this process is in it."""

    host: Host
    store: str
    rank: int
    size: int

    def open(self) -> Any:  # Any: the torch.distributed module
        self.host.enter()
        os.environ["GLOO_SOCKET_IFNAME"] = self.host.interface
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # hosts of the lab have no names to resolve
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)  # many ranks share the cores, and more threads were slower
        dist.init_process_group(
            "gloo",
            init_method=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        return dist


def _worlds(hosts: tuple[Host, ...]) -> list[World]:
    store = f"tcp://{hosts[0].ip}:{free_port()}"
    return [World(host, store, rank, len(hosts)) for rank, host in enumerate(hosts)]


# gloo -----------------------------------------------------------------------------------------


def gloo(case: Case, site: Site) -> list[list[float]]:
    """gloo among the peers alone: ring all-reduce, or broadcast by a tree of whole copies."""
    return run_ranks(_gloo, [(case, world) for world in _worlds(site.peers)], TIMEOUT_S)


def _gloo(case: Case, world: World) -> list[float]:
    dist = world.open()

    def collective(tensor: torch.Tensor) -> None:
        if case.broadcast:
            dist.broadcast(tensor, src=0)
        else:
            dist.all_reduce(tensor)

    seconds = time_steps(case, world.rank, collective, dist.barrier)
    dist.destroy_process_group()
    return seconds


# The original's path --------------------------------------------------------------------------


def original(case: Case, site: Site) -> list[list[float]]:
    """The original's all-reduce: a gloo world of coordinator, peers and miners. The coordinator
    broadcasts what is to be done; every peer reduces segment i to miner i; when all segments are
    reduced, every miner gathers back to every peer. The seconds are the peers'."""
    worlds = _worlds((site.driver, *site.peers, *site.miners))
    results = run_ranks(_original, [(case, world) for world in worlds], TIMEOUT_S)
    return results[1 : case.peers + 1]


def _original(case: Case, world: World) -> list[float]:
    dist = world.open()
    peers = range(1, case.peers + 1)
    miners = range(case.peers + 1, world.size)
    reducing = {miner: dist.new_group([*peers, miner]) for miner in miners}
    gathering = {peer: dist.new_group([*miners, peer]) for peer in peers}
    if world.rank in peers:
        seconds = _original_peer(case, dist, world.rank, reducing, gathering[world.rank])
    else:
        seconds = []
        for _ in range(case.timed_steps):
            _announce(dist)
            if world.rank in miners:
                _original_miner(case, dist, world.rank, reducing[world.rank], gathering)
    dist.destroy_process_group()
    return seconds


def _announce(dist: Any) -> None:
    dist.broadcast_object_list(["all_reduce"], src=0)


def _segment_floats(case: Case) -> int:
    return -(-case.nbytes // 4 // case.miners)  # it pads the last segment


def _original_peer(
    case: Case, dist: Any, rank: int, reducing: dict[int, Any], gathering: Any
) -> list[float]:
    import torch

    size = _segment_floats(case)
    padded = torch.zeros(size * case.miners)
    tensor = padded[: case.nbytes // 4]
    segments = [padded[start : start + size] for start in range(0, padded.numel(), size)]
    seconds = []
    for step in range(case.timed_steps):
        if step % RENEWED_EVERY == 0:  # gloo's reduce overwrites what goes in
            fill(tensor, contribution(case, rank - 1))
        started = time.perf_counter()
        _announce(dist)
        for segment, (miner, group) in zip(segments, reducing.items(), strict=True):
            dist.reduce(segment, dst=miner, group=group)
        mine = torch.empty(size)  # gather wants one of the receiver too, who is first
        received = [torch.empty(size) for _ in range(case.miners + 1)]
        dist.gather(mine, received, dst=rank, group=gathering)
        seconds.append(time.perf_counter() - started)
        if step == 0:
            check(torch.cat(received[1:])[: tensor.numel()], outcome(case))
    return seconds


def _original_miner(
    case: Case, dist: Any, rank: int, reducing: Any, gathering: dict[int, Any]
) -> None:
    import torch

    segment = torch.zeros(_segment_floats(case))
    dist.reduce(segment, dst=rank, group=reducing)
    for peer, group in gathering.items():
        dist.gather(segment, dst=peer, group=group)


# hivemind -------------------------------------------------------------------------------------


def hivemind(case: Case, site: Site) -> list[list[float]] | None:
    """hivemind's all-reduce, its matchmaking left out, as if its slowest rank were the only one;
    None where it is not installed or does not finish."""
    if not HIVEMIND.exists():
        return None
    hosts = [f"{host.ip},{host.namespace or ''}" for host in site.peers]
    argv = [str(HIVEMIND), "-m", "bench.hivemind_rank", "--json", "--hosts", *hosts]
    argv += ["--bytes", str(case.nbytes), "--steps", str(case.steps)]
    with tempfile.TemporaryDirectory(prefix="mapreduce-hivemind-") as directory:
        child = spawn("hivemind", argv, log_path=Path(directory, "log"))
        try:
            code = child.wait(TIMEOUT_S)
            last = (child.last_lines() or ["nothing"])[-1]
        finally:
            child.stop(HIVEMIND_GRACE_S)
    if code != 0:
        print(f"hivemind did not finish: {last}", file=sys.stderr)
        return None
    seconds: list[float] = json.loads(last)["seconds"]
    return [seconds]
