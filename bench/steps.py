"""What every contender runs: a case of so many equal collectives on a tensor of known values.

Knows what goes in, what must come out and how it is timed; knows nothing of how it is moved.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

RIVALS = ("gloo", "original", "hivemind")
WARM_UP_STEPS = 3  # frames, windows and segments have found their size by then
# Values repeat with a prime period, so that a block in the wrong place shows.
PERIOD = 251
# Sums of sums grow by the number of ranks in every step; they are renewed long before float32 ends.
RENEWED_EVERY = 16
_PIECE = PERIOD * 512  # elements filled or compared at a time: no second tensor is needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`steps` counted collectives of `nbytes` bytes of float32 by `peers` peers through `miners`
    miners, after `warm_up` others; `rivals` are who else runs it."""

    peers: int
    miners: int
    nbytes: int
    steps: int = 10
    broadcast: bool = False
    warm_up: int = WARM_UP_STEPS
    rivals: tuple[str, ...] = RIVALS

    @property
    def timed_steps(self) -> int:
        return self.warm_up + self.steps


def fill(tensor: torch.Tensor, factor: int) -> None:
    """Writes 0, 1, .. PERIOD - 1, 0, .. times `factor`: whole numbers, whose sums are exact."""
    for piece, pattern in _pieces(tensor, factor):
        piece.copy_(pattern)


def check(tensor: torch.Tensor, factor: int) -> None:
    """Raises AssertionError unless the tensor is what `fill` writes with this factor."""
    wrong = sum(int((piece != pattern).sum()) for piece, pattern in _pieces(tensor, factor))
    assert wrong == 0, f"{wrong} of {tensor.numel()} elements are wrong"


def _pieces(tensor: torch.Tensor, factor: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    pattern = torch.arange(min(_PIECE, tensor.numel())).remainder_(PERIOD).mul_(factor).float()
    pieces = [tensor[start : start + _PIECE] for start in range(0, tensor.numel(), _PIECE)]
    return [(piece, pattern[: piece.numel()]) for piece in pieces]


def contribution(case: Case, rank: int) -> int:
    """The factor of what a rank (index from 0) brings; for a broadcast only the root's counts."""
    return rank + 1 if rank == 0 or not case.broadcast else 0


def outcome(case: Case) -> int:
    """The factor of what every rank must hold after one collective."""
    return sum(contribution(case, rank) for rank in range(case.peers))


def time_steps(
    case: Case,
    rank: int,
    collective: Callable[[torch.Tensor], object],
    gather_ranks: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of every step of one rank, warm-up included. The values are checked in the first
    step and in one more, which is not timed: a fast wrong answer is none.

    `gather_ranks` is called before each step, off the clock, where a rank may leave a collective
    before the others hold its result: else it would begin the next one meanwhile, and what is timed
    were the period of the steps, not their time.
    """
    import torch

    torch.set_num_threads(1)  # the threads of a fill would spin on into the step
    tensor = torch.empty(case.nbytes // 4)
    seconds = []
    for step in range(case.timed_steps + 1):
        last = step == case.timed_steps
        if step % RENEWED_EVERY == 0 or last:
            fill(tensor, contribution(case, rank))
        if gather_ranks is not None:
            gather_ranks()
        started = time.perf_counter()
        collective(tensor)
        seconds.append(time.perf_counter() - started)
        if step == 0 or last:
            check(tensor, outcome(case))
    return seconds[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Seconds of the slowest rank. Median and p95 leave the warm-up out; `all_s` has every step."""

    median_s: float
    p95_s: float
    steps: int
    all_s: list[float]


def summary(ranks: Sequence[Sequence[float]], warm_up: int = WARM_UP_STEPS) -> Summary:
    """Of the seconds per step of every rank."""
    slowest = [max(step) for step in zip(*ranks, strict=True)]
    ordered = sorted(slowest[warm_up:])
    return Summary(
        median_s=statistics.median(ordered),
        p95_s=ordered[-(-95 * len(ordered) // 100) - 1],  # nearest rank
        steps=len(ordered),
        all_s=slowest,
    )
