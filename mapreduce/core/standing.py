"""All that is remembered of one miner from window to window, and how a window changes it.

Knows goodputs, counts and times that a validator and its bots have measured. Knows nothing of other
miners, of clocks, of hotkeys, and nothing that a miner says of itself. A new hotkey begins with
`Standing()`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import median, median_high
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mapreduce.core.scoring_config import ScoringConfig

_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerSeen:
    """What the real jobs of one owner brought for one miner in one window.

    An owner is the coldkey of registered hotkeys; all peers without registration are one owner
    together, since keys cost nothing. `ratios` has one entry per job that could tell: see
    `goodput.relative_rates`.
    """

    completed: float = 0.0
    failed: float = 0.0
    ratios: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one window brought for one miner.

    `goodputs_bytes_per_s` has one entry per benchmark slot, 0.0 for one that the miner failed;
    slots that a bot spoiled are left out. `completed` and `failed` count benchmark jobs alone;
    `unknown` counts openings that the miner owed and did not give, beside one given per completed
    job.
    """

    goodputs_bytes_per_s: tuple[float, ...] = ()
    completed: float = 0.0
    failed: float = 0.0
    unknown: float = 0.0
    latencies_s: tuple[float, ...] = ()
    owners: Mapping[str, OwnerSeen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerView:
    """What one owner's real jobs have shown of a miner so far; the counts are discounted, the jobs
    that gave a ratio are not."""

    completed: float = 0.0
    failed: float = 0.0
    rated_jobs: int = 0
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One miner's past. None: not measured yet.

    `completed` and `failed` are discounted; `openness` is the share of openings given; the owner
    that was heard of last is the last of `owners`.
    """

    goodput_bytes_per_s: float | None = None
    windows_measured: int = 0
    completed: float = 0.0
    failed: float = 0.0
    openness: float = 1.0
    latency_s: float | None = None
    owners: Mapping[str, OwnerView] = field(default_factory=dict)


def advance(standing: Standing, seen: Seen, config: ScoringConfig) -> Standing:
    """The standing after one more window. What was not measured in it stays as it was."""
    goodput = median(seen.goodputs_bytes_per_s) if seen.goodputs_bytes_per_s else None
    # The average begins with the first window in which the miner worked: a slot that failed before
    # would pull it down for as long as a change of capacity takes to show.
    begun = standing.goodput_bytes_per_s is not None or bool(goodput)
    worked = any(value > 0 for value in seen.goodputs_bytes_per_s)
    # A plain mean of the first windows: one is too noisy to begin an average with.
    alpha = max(config.ema_alpha, 1 / (standing.windows_measured + 1))
    latency = median(seen.latencies_s) if seen.latencies_s else None
    keep = config.reliability_forgetting if seen.completed + seen.failed > 0 else 1.0
    return Standing(
        goodput_bytes_per_s=_ema(standing.goodput_bytes_per_s, goodput if begun else None, alpha),
        windows_measured=standing.windows_measured + worked,
        completed=keep * standing.completed + seen.completed,
        failed=keep * standing.failed + seen.failed,
        openness=_openness(standing.openness, seen, config),
        latency_s=_ema(standing.latency_s, latency, alpha),
        owners=_owners(standing.owners, seen.owners, config) if seen.owners else standing.owners,
    )


def reliability(standing: Standing, config: ScoringConfig) -> float:
    """Share of jobs completed, by the bots' jobs or by the users', whichever is worse.

    Users are heard as the median of their owners, so that nobody alone can lower a miner, and with
    some slack, so that chance does not; where two are the median the milder counts. They can lower
    a miner no further than to the floor: what they say is not proven, and must not end its pay.
    """
    prior = config.reliability_prior
    bots = _share(standing.completed + prior, standing.failed)
    views = [view for view in standing.owners.values() if view.completed + view.failed > 0]
    if len(views) < config.organic_owners:
        return bots
    users = median_high(_share(view.completed + prior, view.failed) for view in views)
    return min(bots, max(config.reliability_floor, config.organic_reliability_slack * users))


def organic_ratio(standing: Standing, config: ScoringConfig) -> float | None:
    """Speed in real jobs over what the bots' measurements promise; None while too few have been.

    The median over owners, so that a miner's own jobs cannot repair it (nor a rival's ruin it).
    """
    views = [view for view in standing.owners.values() if view.ratio is not None]
    enough = sum(view.rated_jobs for view in views) >= config.organic_jobs
    if len(views) < config.organic_owners or not enough:
        return None
    return median_high(view.ratio for view in views if view.ratio is not None)


def to_json(standing: Standing) -> str:
    """The standing as text for a store; `from_json` gives it back bit for bit."""
    return json.dumps({"version": _VERSION} | asdict(standing), separators=(",", ":"))


def from_json(text: str) -> Standing:
    """What `to_json` wrote. Raises ValueError for another version, or for anything else."""
    try:
        values = json.loads(text)
        version = values.pop("version")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("this is no standing") from error
    if version != _VERSION:
        raise ValueError(f"a standing of version {version!r}: only {_VERSION} is known")
    owners = values.pop("owners", None)
    if not isinstance(owners, dict):
        raise ValueError("a standing without owners")
    return Standing(
        owners={owner: OwnerView(**_numbers(OwnerView, view)) for owner, view in owners.items()},
        **_numbers(Standing, values),
    )


def _numbers(kind: type[OwnerView | Standing], values: object) -> dict[str, Any]:
    """Exactly the numbers that `kind` has, or ValueError."""
    kinds = {known.name: str(known.type) for known in fields(kind) if known.name != "owners"}
    if not isinstance(values, dict) or set(values) != set(kinds):
        raise ValueError(f"{kind.__name__} has the fields {', '.join(kinds)}")
    for name, value in values.items():
        if value is None and "None" in kinds[name]:
            continue
        known = int if kinds[name] == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, known) or not 0 <= value < math.inf:
            raise ValueError(f"{name} of a standing is {value!r}")
    return values


def _share(good: float, bad: float) -> float:
    return good / (good + bad) if good + bad > 0 else 1.0


def _ema(old: float | None, new: float | None, alpha: float) -> float | None:
    if old is None or new is None:
        return new if old is None else old
    return old + alpha * (new - old)


def _openness(old: float, seen: Seen, config: ScoringConfig) -> float:
    """A Beta's mean, whose prior is as heavy as what its forgetting remembers: so it is an average
    with that forgetting, over the window's openings in an order that nobody knows."""
    asked = seen.completed + seen.unknown
    if asked <= 0:
        return old
    keep = math.pow(config.unknown_forgetting, asked)
    return keep * old + (1 - keep) * seen.completed / asked


def _owners(
    known: Mapping[str, OwnerView], seen: Mapping[str, OwnerSeen], config: ScoringConfig
) -> dict[str, OwnerView]:
    keep = config.reliability_forgetting
    owners = {
        owner: replace(view, completed=keep * view.completed, failed=keep * view.failed)
        for owner, view in known.items()
    }
    for owner, brought in sorted(seen.items()):
        view = owners.pop(owner, OwnerView())  # popped: it comes last, as the newest
        ratio = view.ratio
        for rated, observed in enumerate(brought.ratios, view.rated_jobs + 1):
            # As above, and a real job is noisier still.
            ratio = _ema(ratio, observed, max(config.owner_ema_alpha, 1 / rated))
        owners[owner] = OwnerView(
            completed=view.completed + brought.completed,
            failed=view.failed + brought.failed,
            rated_jobs=view.rated_jobs + len(brought.ratios),
            ratio=ratio,
        )
    heard = [
        (owner, view)
        for owner, view in owners.items()
        if view.completed + view.failed >= config.owner_least_jobs
    ]
    return dict(heard[-config.owners_kept :])
