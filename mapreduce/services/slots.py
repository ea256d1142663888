"""One benchmark job (a slot) in numbers: how large it is, and what its reports say of each miner.

Pure. Knows reports, estimates and goodput. Does not know bots, routes or the store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

from mapreduce.core.clusters import split
from mapreduce.core.goodput import slot_goodput
from mapreduce.core.partition import MIN_SEGMENT_BYTES
from mapreduce.wire.benchmarks import MAX_STEP_NUMBERS, MAX_STEPS
from mapreduce.wire.terms import MAX_BANDWIDTH

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.wire.benchmarks import BenchmarkReport

STEPS = 20  # of a slot, by estimate: each is long beside a round trip, and short beside the slot
SIZE_SPREAD = 2.0  # sizes are drawn from a range this wide, as users' tensors differ too
# Of an estimate: an unknown miner is measured small first, and again while it turns out faster.
FIRST_ESTIMATE_BYTES_PER_S = 2 * 100e6 / 8
STILL_RISING = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSize:
    """What the bots of a slot are told: bytes of a step's tensor, steps at most, and a bot's
    rate."""

    tensor_bytes: int
    steps: int
    bytes_per_s: float


def slot_size(
    estimates: Sequence[float],
    peer_count: int,
    *,
    seconds: float,
    max_bytes_per_s: float,
    chance: float,
) -> SlotSize:
    """Steps of which about `STEPS` keep miners of these goodputs (bytes/s in and out) busy for
    `seconds`.

    Args:
        max_bytes_per_s: what all bots together may send.
        chance: from 0 to 1, picks the size in its range.
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
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a slot says of one miner. `bytes` went in and out of it; `goodput_bytes_per_s` is 0
    unless it was measured. Void: nothing can be said, and not by its fault."""

    outcome: Literal["measured", "failed", "void"]
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
    clusters: Mapping[str, str],
    config: ScoringConfig,
) -> dict[str, Verdict]:
    """By hotkey, what the reports (by rank) of a slot say of the miners `uids`.

    Bots are trusted not to lie, but not to have a working network: a miner has failed if more than
    half of all bots say so, or if one of them holds a proof. `refused` are miners that did not take
    the job, and why. What a cluster carried together is split equally.
    """
    verdicts = {
        hotkey: _judge_one(uid, reports, peer_count, refused.get(hotkey), config)
        for uid, hotkey in uids.items()
    }
    measured = {h: v.goodput_bytes_per_s for h, v in verdicts.items() if v.outcome == "measured"}
    for hotkey, goodput in split(measured, clusters).items():
        verdict = verdicts[hotkey]
        verdicts[hotkey] = Verdict(
            outcome="measured",
            goodput_bytes_per_s=goodput,
            latency_s=verdict.latency_s,
            seconds=verdict.seconds,
            bytes=verdict.bytes,
        )
    return verdicts


def _judge_one(
    uid: int,
    reports: Mapping[int, BenchmarkReport],
    peer_count: int,
    refusal: str | None,
    config: ScoringConfig,
) -> Verdict:
    if refusal is not None:
        return Verdict(outcome="failed", reason=f"did not take the job: {refusal}")
    steps, latencies = _steps_of(uid, reports.values(), peer_count)
    seconds = math.fsum(busy_s for _, busy_s in steps)
    nbytes = round(sum(moved for moved, _ in steps))
    blames = [
        next(blame for blame in report.blames if blame.uid == uid)
        for report in reports.values()
        if any(blame.uid == uid for blame in report.blames)
    ]
    proven = [blame for blame in blames if blame.kind == "wrong"]
    if proven or len(blames) * 2 > peer_count:
        worst = (proven or blames)[0]
        reason = f"{worst.kind}: {worst.what}"
        return Verdict(outcome="failed", seconds=seconds, bytes=nbytes, reason=reason)
    goodput = slot_goodput(steps, config)
    if goodput is None:
        errors = [r.error for r in reports.values() if r.error] or ["too little was measured"]
        return Verdict(outcome="void", seconds=seconds, bytes=nbytes, reason=errors[0])
    return Verdict(
        outcome="measured",
        goodput_bytes_per_s=goodput,
        latency_s=median(latencies),
        seconds=seconds,
        bytes=nbytes,
    )


def _steps_of(
    uid: int, reports: Collection[BenchmarkReport], peer_count: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """The miner's steps, as (bytes in and out of all ranks, seconds), and the seconds to its first
    result in each, from when the last rank had entered."""
    steps, latencies = [], []
    counts = [len(report.steps) for report in reports]
    for number in range(min(counts, default=0)):
        parts = [p for report in reports for p in report.steps[number] if p.uid == uid]
        if len(parts) != len(reports) or len({part.nbytes for part in parts}) != 1:
            continue  # it had no part in the step
        busy_s = median(part.busy_us for part in parts) * 1e-6
        steps.append((2.0 * peer_count * parts[0].nbytes, busy_s))
        latencies.append(min(part.first_us for part in parts) * 1e-6)
    return steps, latencies
