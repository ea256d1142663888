"""Every constant of the measurements and of the score, with its reason and its allowed range.

Knows numbers only. Knows nothing of the formula that uses them (`scoring.py`, `goodput.py`), nor of
files and flags: those are generated from the fields and their metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _number(default: float, low: float, high: float, why: str) -> Any:  # Any: as `field` itself
    return field(default=default, metadata={"help": why, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """One field per constant; raises ValueError for one that is out of its range."""

    window_s: float = _number(
        4320.0, 1, 604_800, "seconds of a scoring window; 72 minutes: 360 blocks of 12 s, an epoch"
    )
    ema_alpha: float = _number(
        0.2,
        0.01,
        1,
        "weight of the newest window's goodput; at .2, 11 windows show nine tenths of a change",
    )
    ramp_windows: int = _number(
        12, 1, 1000, "windows until a newcomer has full weight, so that new keys are no way out"
    )

    reliability_forgetting: float = _number(
        0.98, 0.5, 1, "what a window leaves of older successes and failures; .98 halves in 34"
    )
    reliability_prior: float = _number(
        20.0, 0, 10_000, "successes taken for granted; with 20, one or two timeouts are no verdict"
    )
    reliability_floor: float = _number(
        0.9,
        0,
        1,
        "a reliability below this scores 0; honest miners with 1 timeout in 100 stay above",
    )
    reliability_power: float = _number(
        2.0, 0, 10, "exponent of the reliability; 2, as a failed miner also costs the others' time"
    )

    latency_share: float = _number(
        0.1, 0, 1, "share of the score that latency decides; small, as bandwidth is what is bought"
    )

    ban_s: float = _number(
        604_800.0,
        0,
        31_536_000,
        "seconds without pay after a proof; after 7 days cheating on 1 of 100 jobs was a loss",
    )
    disputed_gate: float = _number(
        0.5, 0, 1, "factor for a miner that many parties dispute with; half, as it is no proof"
    )
    unknown_forgetting: float = _number(
        0.999,
        0.5,
        1,
        "what one opening leaves of older ones; .999 remembers 1000, taken as given at first",
    )
    unknown_full: float = _number(
        0.96, 0, 1, "share of openings given from which on the gate is 1 (thresholds as Storj's)"
    )
    unknown_half: float = _number(
        0.9, 0, 1, "share of openings given from which on the gate is `unknown_gate`; below it is 0"
    )
    unknown_gate: float = _number(
        0.5, 0, 1, "factor between the two thresholds; half, as silence is no proof"
    )

    cluster_discount: float = _number(
        0.02, 0, 1, "lost per further miner of a cluster, so that splitting one up never pays"
    )
    cluster_floor: float = _number(
        0.5, 0, 1, "the discount's end: large honest farms still earn at least half"
    )

    organic_jobs: int = _number(
        20, 1, 100_000, "real jobs before their speed may lower a score: fewer are noise"
    )
    organic_owners: int = _number(
        3, 1, 1000, "owners of real jobs before they may lower a score: fewer have no honest median"
    )
    organic_slack: float = _number(
        1.1, 1, 10, "real jobs count as this much faster, so that noise lowers nobody"
    )
    organic_reliability_slack: float = _number(
        1.05, 1, 10, "real jobs count as this much more reliable, so that chance lowers nobody"
    )
    organic_ratio_min: float = _number(
        0.25, 0.01, 1, "the least that one real job can say about a miner's speed"
    )
    organic_peers: int = _number(
        3, 2, 256, "peers of a real job that it takes to tell a slow miner from a slow peer"
    )
    organic_miners: int = _number(
        3, 2, 256, "miners of a real job that it takes to tell a slow miner from a slow peer"
    )
    owner_ema_alpha: float = _number(
        0.1, 0.01, 1, "weight of an owner's newest job; .1: 22 jobs show nine tenths of a change"
    )
    owners_kept: int = _number(
        256, 3, 10_000, "owners of real jobs remembered per miner, which bounds the state"
    )
    owner_least_jobs: float = _number(
        0.05, 0, 1, "discounted jobs below which an owner is forgotten: one job's after 150 windows"
    )

    capacity_ratio: float = _number(
        2.25, 1, 100, "bots' capacity over a miner's estimate (FlashFlow, arXiv 2004.09583)"
    )
    slot_warm_up_s: float = _number(
        2.0, 0, 600, "seconds of a measurement dropped at its start, as TCP's slow start"
    )
    slot_short_s: float = _number(
        10.0, 0.1, 600, "measurements shorter than this are cut into tenths, not into seconds"
    )
    slot_least_s: float = _number(
        0.1, 0, 600, "less time busy than this is no measurement: tenths would be a clock's grain"
    )

    def __post_init__(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            low, high = known.metadata["low"], known.metadata["high"]
            if not low <= value <= high:
                raise ValueError(f"{known.name} is {value}: {low} to {high} is allowed")
        if self.unknown_half > self.unknown_full:
            raise ValueError("unknown_half is above unknown_full")
        if self.organic_owners > self.owners_kept:
            raise ValueError("organic_owners is above owners_kept")
