"""One benchmark job (a slot) in numbers: how large it is, and what its reports say of each miner.

Pure. Knows reports, estimates and goodput. Does not know bots, routes or the store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from mapreduce.core.goodput import slot_goodput
from mapreduce.core.partition import MIN_SEGMENT_BYTES
from mapreduce.wire.benchmarks import MAX_STEP_NUMBERS, MAX_STEPS
from mapreduce.wire.terms import MAX_BANDWIDTH

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.wire.benchmarks import BenchmarkReport, Blame

STEPS = 10  # of a slot, by estimate: each is long beside a round trip, and short beside the slot
WAIT_SHARE = 0.05  # of a step
LEAST_PAUSE = 0.3  # of a step by estimate; at most as long as one
SIZE_SPREAD = 2.0  # sizes are drawn from a range this wide, as users' tensors differ too
# Of an estimate: an unknown miner is measured small first, and again while it turns out faster.
FIRST_ESTIMATE_BYTES_PER_S = 2 * 100e6 / 8
STILL_RISING = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSize:
    """What the bots of a slot are told: bytes of a step's tensor, steps at most, a bot's rate, and
    the pause between two steps."""

    tensor_bytes: int
    steps: int
    bytes_per_s: float
    pause_s: float


def slot_size(
    estimates: Sequence[float],
    peer_count: int,
    *,
    seconds: float,
    max_bytes_per_s: float,
    chance: float,
    leisure: float,
) -> SlotSize:
    """Steps of which about `STEPS` keep miners of these goodputs (bytes/s in and out) busy for
    `seconds`.

    Args:
        max_bytes_per_s: what all bots together may send.
        chance: from 0 to 1, picks the size in its range.
        leisure: from 0 to 1, picks the pause in its range.
    """
    into_miners = min(sum(estimates) / 2, max_bytes_per_s)
    spread = SIZE_SPREAD ** (chance - 0.5)
    wanted = int(into_miners * seconds / STEPS * spread / peer_count)
    # Smaller ones go to one miner whole, and a step must reach all.
    least = 4 * MIN_SEGMENT_BYTES * len(estimates)
    tensor_bytes = min(max(wanted, least), MAX_BANDWIDTH)
    return SlotSize(
        tensor_bytes=tensor_bytes - tensor_bytes % 4,
        steps=max(1, min(MAX_STEPS, MAX_STEP_NUMBERS // len(estimates))),
        bytes_per_s=max_bytes_per_s / peer_count,
        # Long enough for a bot to recompute a step, so that its gaps are those of this range.
        pause_s=seconds / STEPS * (LEAST_PAUSE + (1 - LEAST_PAUSE) * leisure),
    )


Outcome = Literal["measured", "failed", "void"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a slot says of one miner. `bytes` went in and out of it; `goodput_bytes_per_s` is 0
    unless it was measured. Void: nothing can be said, and not by its fault."""

    outcome: Outcome
    goodput_bytes_per_s: float = 0.0
    latency_s: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    reason: str = ""


def judge(
    uids: Mapping[int, str],
    reports: Mapping[int, BenchmarkReport],
    peer_count: int,
    *,
    refused: Mapping[str, str],
    seconds: float,
    config: ScoringConfig,
) -> dict[str, Verdict]:
    """By hotkey, what the reports (by rank) of a slot say of the miners `uids`.

    Bots are trusted not to lie, but not to have a working network: a miner has failed if more than
    half of all bots say so, or if one of them holds a proof. `refused` are miners that did not take
    the job, and why. A slot that broke off before half of its `seconds` measures nobody: a miner
    could choose the moment.
    """
    blamed = _blamed(uids, reports, peer_count)
    broken = any(report.error for report in reports.values())
    verdicts = {}
    for uid, hotkey in uids.items():
        steps, latencies = _steps_of(uid, reports.values(), peer_count)
        busy_s = math.fsum(step_s for _, step_s in steps)
        goodput = slot_goodput(steps, config)
        told = Verdict(
            outcome="void", seconds=busy_s, bytes=round(math.fsum(moved for moved, _ in steps))
        )
        if hotkey in refused:
            reason = f"did not take the job: {refused[hotkey]}"
            verdicts[hotkey] = replace(told, outcome="failed", reason=reason)
        elif uid in blamed:
            verdicts[hotkey] = replace(told, outcome="failed", reason=blamed[uid])
        elif goodput is None or (broken and busy_s < seconds / 2):
            errors = [report.error for report in reports.values() if report.error]
            verdicts[hotkey] = replace(told, reason=(errors or ["too little was measured"])[0])
        else:
            verdicts[hotkey] = replace(
                told,
                outcome="measured",
                goodput_bytes_per_s=goodput,
                latency_s=median(latencies),
            )
    return verdicts


def _blamed(
    uids: Mapping[int, str], reports: Mapping[int, BenchmarkReport], peer_count: int
) -> dict[int, str]:
    """The miners at fault, and in a few words for what.

    A bot that is alone and has lost all of several miners is cut off itself. That a miner told of
    an abort counts if all bots were told: then none of them has begun it.
    """
    by_bot = [report.blames for report in reports.values()]
    if peer_count == 1 and len(uids) > 1:
        cut_off = ("lost", "stalled")
        by_bot = [b for b in by_bot if {x.uid for x in b if x.kind in cut_off} != set(uids)]
    if not (len(by_bot) == peer_count and all(_told(blames) for blames in by_bot)):
        by_bot = [[blame for blame in b if blame.kind != "aborted"] for b in by_bot]
    blamed = {}
    for uid in uids:
        of_miner = [[blame for blame in blames if blame.uid == uid] for blames in by_bot]
        found = [blames[0] for blames in of_miner if blames]
        proven = [blame for blames in of_miner for blame in blames if blame.kind == "wrong"]
        if proven or len(found) * 2 > peer_count:
            worst = (proven or found)[0]
            blamed[uid] = f"{worst.kind}: {worst.what}"
    return blamed


def _told(blames: Sequence[Blame]) -> bool:
    return any(blame.kind == "aborted" for blame in blames)


def _steps_of(
    uid: int, reports: Collection[BenchmarkReport], peer_count: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """The miner's steps, as (bytes in and out of all ranks, seconds), and the seconds to its first
    result in each.

    A step has taken as long as the rank that waited longest says: a miner that serves the ranks one
    after the other gains nothing. The wait for the first result is left out as far as it is a small
    part of that: it is the miner's latency, which is scored by itself, and other ranks' being late;
    a miner could make it a large part.
    """
    steps, latencies = [], []
    counts = [len(report.steps) for report in reports]
    for number in range(min(counts, default=0)):
        told = [[p for p in report.steps[number] if p.uid == uid] for report in reports]
        if any(len(parts) != 1 for parts in told):
            continue  # it had no part in the step
        parts = [part for (part,) in told]
        if len({part.nbytes for part in parts}) == 1:
            busy_us = max(p.last_us - min(p.first_us, WAIT_SHARE * p.last_us) for p in parts)
            steps.append((2.0 * peer_count * parts[0].nbytes, busy_us * 1e-6))
            latencies.append(min(part.first_us for part in parts) * 1e-6)
    return steps, latencies
