"""The score: what a miner's measured speed, reliability and honesty are worth as a share of all.

Knows the standings of all miners (`standing.py`), who is banned, disputed, and clustered with whom.
Knows nothing of clocks, of the chain, of how anything was measured, and nothing that a miner
claims. Linear in capacity on purpose: a concave formula pays for splitting a miner up, a convex one
pays for one giant.

    score  = gate * ramp * cap * reliability^2 * latency factor * cluster factor
    weight = score / sum(score)
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.core.standing import (
    OwnerSeen,
    OwnerView,
    Seen,
    Standing,
    advance,
    from_json,
    organic_ratio,
    reliability,
    to_json,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

__all__ = [
    "Components",
    "OwnerSeen",
    "OwnerView",
    "ScoringConfig",
    "Seen",
    "Standing",
    "advance",
    "from_json",
    "score_all",
    "to_json",
    "weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """A score and every factor of it, for whoever wants to know why.

    `cap_bytes_per_s` is the goodput that is paid for: what the bots measured, lowered by `phi` (the
    speed of real jobs over theirs, None while those were too few) and by what bots can measure.
    `reasons` says in words what lowers the score.
    """

    goodput_bytes_per_s: float
    cap_bytes_per_s: float
    phi: float | None
    reliability: float
    latency_s: float | None
    latency_factor: float
    gate: float
    ramp: float
    cluster_size: int
    cluster_factor: float
    score: float
    weight: float
    reasons: tuple[str, ...]


def score_all(
    standings: Mapping[str, Standing],
    *,
    banned: Mapping[str, str],
    disputed: AbstractSet[str],
    clusters: Mapping[str, int | str],
    cap_bytes_per_s: float,
    config: ScoringConfig,
) -> dict[str, Components]:
    """Scores and weights by hotkey, best first; the order of the arguments plays no part.

    Args:
        banned: Hotkeys with a proof against them, and which.
        disputed: Hotkeys that `attribution.flagged` names.
        clusters: Hotkey to cluster (`clusters.clusters`); one that is missing stands alone.
        cap_bytes_per_s: The most that the bots can measure; miners above it are tied.
    """
    latencies = [
        standing.latency_s
        for hotkey, standing in standings.items()
        if standing.latency_s is not None and hotkey not in banned
    ]
    reference_s = median(latencies) if latencies else 0.0
    sizes = Counter(clusters[hotkey] for hotkey in standings if hotkey in clusters)
    scored = {}
    for hotkey, standing in standings.items():
        scored[hotkey] = _components(
            standing,
            ban=banned.get(hotkey),
            disputed=hotkey in disputed,
            cluster_size=sizes[clusters[hotkey]] if hotkey in clusters else 1,
            reference_s=reference_s,
            limit_bytes_per_s=cap_bytes_per_s,
            config=config,
        )
    total = math.fsum(parts.score for parts in scored.values())  # fsum: the same in any order
    ranked = sorted(scored.items(), key=lambda entry: (-entry[1].score, entry[0]))
    if total == 0:
        return dict(ranked)
    return {hotkey: replace(parts, weight=parts.score / total) for hotkey, parts in ranked}


def weights(scored: Mapping[str, Components]) -> dict[str, float]:
    """Weight by hotkey, for those that have one. Empty, and never uniform, if all scores are 0."""
    return {hotkey: parts.weight for hotkey, parts in scored.items() if parts.weight > 0}


def _components(
    standing: Standing,
    *,
    ban: str | None,
    disputed: bool,
    cluster_size: int,
    reference_s: float,
    limit_bytes_per_s: float,
    config: ScoringConfig,
) -> Components:
    reasons: list[str] = []
    goodput = standing.goodput_bytes_per_s or 0.0
    if standing.goodput_bytes_per_s is None:
        reasons.append("not measured yet")

    gate = 1.0
    if standing.openness < config.unknown_full:
        gate = config.unknown_gate if standing.openness >= config.unknown_half else 0.0
        reasons.append(
            f"share of openings given {standing.openness:.3f} below {config.unknown_full:.2f}"
        )
    if disputed:
        gate = min(gate, config.disputed_gate)
        reasons.append("disputed by many peers")
    if ban is not None:
        gate = 0.0
        reasons.append(f"banned: {ban}")

    ramp = min(1.0, standing.windows_measured / config.ramp_windows)
    if ramp < 1:
        reasons.append(f"measured in {standing.windows_measured} of {config.ramp_windows} windows")

    phi = organic_ratio(standing, config)
    organic = min(1.0, config.organic_slack * phi) if phi is not None else 1.0
    if organic < 1:
        reasons.append(f"real jobs run at {phi:.2f} of the measured speed")
    cap = min(limit_bytes_per_s, goodput * organic)
    if cap < goodput * organic:
        reasons.append(
            f"paid up to the {limit_bytes_per_s * 4e-6:.0f} Mbit/s each way that bots can measure"
        )

    reliable = reliability(standing, config)
    if reliable < config.reliability_floor:
        reasons.append(f"reliability {reliable:.3f} below {config.reliability_floor:.2f}")
    counted = reliable**config.reliability_power if reliable >= config.reliability_floor else 0.0

    latency_factor = 1.0
    if standing.latency_s is not None and standing.latency_s > reference_s:
        latency_factor -= config.latency_share * (1 - reference_s / standing.latency_s)

    cluster_factor = max(config.cluster_floor, 1 - config.cluster_discount * (cluster_size - 1))
    if cluster_size > 1:
        reasons.append(f"one of {cluster_size} miners that share a network or an owner")

    return Components(
        goodput_bytes_per_s=goodput,
        cap_bytes_per_s=cap,
        phi=phi,
        reliability=reliable,
        latency_s=standing.latency_s,
        latency_factor=latency_factor,
        gate=gate,
        ramp=ramp,
        cluster_size=cluster_size,
        cluster_factor=cluster_factor,
        score=gate * ramp * cap * counted * latency_factor * cluster_factor,
        weight=0.0,
        reasons=tuple(reasons),
    )
