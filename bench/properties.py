"""What the incentive promises, as figures of simulated subnets beside their bounds.

Knows the scenes of `incentive.py` and the bounds P1 to P11 of the design. `scale` shortens the long
scenes: 1 is the full run, a tenth is what the fast tests do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.incentive import (
    Miner,
    Owner,
    Subnet,
    cosine,
    deterrence,
    kendall_tau,
    log_uniform,
    pay,
)
from mapreduce.core.scoring import ScoringConfig, weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MINERS: Final = 64
CAPACITY: Final = 125e6
BAN_WINDOWS: Final = round(ScoringConfig().ban_s / ScoringConfig().window_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number; `bound` None: shown and not promised."""

    what: str
    value: float
    bound: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        if self.bound is None:
            return True
        return bool(self.value >= self.bound if self.at_least else self.value <= self.bound)


def _honest(capacities: Sequence[float], timeouts: float = 0.01) -> list[Miner]:
    return [
        Miner(kind="honest", capacity_bytes_per_s=capacity, timeouts=timeouts)
        for capacity in capacities
    ]


def _mean_pay(subnet: Subnet, windows: int, *, every: int = 1) -> dict[str, float]:
    """Pay by kind over the next windows, looked at in each `every`th."""
    seen = []
    for _ in range(windows // every):
        subnet.run(every)
        seen.append(pay(subnet))
    return {kind: float(np.mean([look[kind] for look in seen])) for kind in seen[0]}


def p1_order(scale: float, seed: int) -> list[Figure]:
    """Weights order miners by capacity, and are in proportion to it."""
    figures = []
    for decades, bound in ((2, 0.95), (1, 0.93)):
        taus, errors = [], []
        for run in range(round(40 * scale)):
            capacities = log_uniform(MINERS, decades, seed + run)
            subnet = Subnet(_honest(capacities, 0.0), seed=seed + run)
            subnet.run(25)
            scored = subnet.scores()
            got = [scored[hotkey].weight for hotkey in subnet.miners]
            taus.append(kendall_tau(capacities, got))
            errors.append(np.abs(np.array(got) / capacities * sum(capacities) - 1))
        what = f"{decades} decade(s), 25 windows: "
        worst, error = min(taus), float(np.percentile(errors, 95))
        figures += [
            Figure(what=what + "least Kendall tau", value=worst, bound=bound, at_least=True),
            Figure(what=what + "p95 relative weight error", value=error, bound=0.08),
        ]
    return figures


def p2_cheating(scale: float, seed: int) -> list[Figure]:
    """Who cheats earns a small part of what honesty earns."""
    figures = []
    for cheats, detected, bound in ((0.05, 0.2, 0.05), (0.01, 0.99, 0.03), (1.0, 0.2, 0.01)):
        cheater = Miner(
            kind="cheating", capacity_bytes_per_s=CAPACITY, cheats=cheats, detected=detected
        )
        subnet = Subnet([*_honest([CAPACITY] * 8), *[cheater] * 64], seed=seed)
        subnet.run(2)
        caught = sum(parts.weight == 0 for parts in subnet.scores().values()) / 64
        # A whole number of bans, so that the share is not one of a cycle's beginning.
        earned = _mean_pay(subnet, round(20 * scale) * BAN_WINDOWS)["cheating"]
        what = f"cheats in {cheats:.0%} of jobs, {detected:.0%} found: "
        figures += [
            Figure(what=what + "pay over honest pay", value=earned, bound=bound),
            Figure(
                what=what + "the same by renewal",
                value=deterrence(cheats, detected, BAN_WINDOWS),
                bound=bound,
            ),
        ]
        if cheats == 1:
            what += "share at 0 within 2 windows"
            figures.append(Figure(what=what, value=caught, bound=0.99, at_least=True))
    return figures


def p3_timeouts(scale: float, seed: int) -> list[Figure]:
    """Random timeouts cost honest miners little."""
    flawed = Miner(kind="timeouts", capacity_bytes_per_s=CAPACITY, timeouts=0.01)
    subnet = Subnet([*_honest([CAPACITY] * 16, 0.0), *[flawed] * MINERS], seed=seed)
    windows = round(1e5 * scale / MINERS)
    bans = unreliable = 0
    earned = []
    for _ in range(windows):
        subnet.run(1)
        scored = subnet.scores()
        bans += sum(parts.gate == 0 for parts in scored.values())
        unreliable += sum(parts.reliability < 0.9 for parts in scored.values())
        earned.append(pay(subnet)["timeouts"])
    what = "1 % timeouts: "
    return [
        Figure(what=what + "bans", value=bans, bound=0),
        Figure(
            what=what + "share of windows with reliability < .9",
            value=unreliable / windows / MINERS,
            bound=1e-4,
        ),
        Figure(what=what + "weight lost", value=1 - float(np.mean(earned)), bound=0.03),
    ]


def _sybil_pay(miners: int, network: str, owners: int, scale: float, seed: int) -> float:
    sybil = Miner(
        kind="sybil",
        capacity_bytes_per_s=CAPACITY,
        timeouts=0.0,
        pipe="shared",
        network=network,
    )
    subnet = Subnet(
        [*_honest([CAPACITY] * MINERS), *[sybil] * miners], seed=seed, owners=[Owner()] * owners
    )
    subnet.run(20)
    return _mean_pay(subnet, round(200 * scale), every=4)["sybil"]


def p4_sybils(scale: float, seed: int) -> list[Figure]:
    """One capacity on several uids of one address earns no more than on one."""
    alone = _sybil_pay(1, "shared", 0, scale, seed)
    return [
        Figure(
            what=f"{miners} uids of one address: pay over that of one uid",
            value=_sybil_pay(miners, "shared", 0, scale, seed) / alone,
            bound=1.0,
        )
        for miners in (2, 4, 8)
    ]


def p4_hidden_sybils(scale: float, seed: int) -> list[Figure]:
    """The same on several addresses, which takes measuring pairs at once to find out."""
    what = "{} uids of {} addresses, one line{}: pay (wants <= 1.10)"
    return [
        Figure(
            what=what.format(miners, miners, ", and real jobs" if owners else ""),
            value=_sybil_pay(miners, "", owners, scale, seed),
        )
        for miners in (2, 4, 8)
        for owners in (0, 8)
    ]


def _two_faced(decades: float, owners: Sequence[Owner], seed: int) -> Subnet:
    capacities = log_uniform(MINERS - 8, decades, seed)
    middle = float(np.median(capacities))
    two_faced = Miner(
        kind="two-faced", capacity_bytes_per_s=middle, speed_for_users=0.5, timeouts=0.0
    )
    return Subnet([*_honest(capacities), *[two_faced] * 8], seed=seed, owners=owners)


def p5_two_faced(scale: float, seed: int) -> list[Figure]:
    """Who is fast for bots alone is paid for what users get, as far as their jobs can tell."""
    figures = []
    for decades, bound in ((0, 0.60), (1, None), (2, None)):
        subnet = _two_faced(decades, [Owner()] * 3, seed)
        subnet.run(8)  # of three real jobs; those of the first have nothing to compare with
        what = f"half speed for users, others within {decades} decade(s): pay after "
        value = pay(subnet)["two-faced"]
        figures.append(Figure(what=what + "21 real jobs", value=value, bound=bound))
        value = _mean_pay(subnet, round(100 * scale))["two-faced"]
        figures.append(Figure(what=what + "more", value=value, bound=bound))
    return figures


def p6_washing(scale: float, seed: int) -> list[Figure]:
    """Made up jobs by a third of the owners win nothing."""
    washing = [Owner(praises=frozenset({"honest", "two-faced"}))] * 3
    plain, washed = (
        _two_faced(0, [*owners, *[Owner()] * 6], seed) for owners in ([Owner()] * 3, washing)
    )
    gains, faces = [], []
    for _ in range(max(2, round(20 * scale))):
        plain.run(10)
        washed.run(10)
        before, after = plain.scores(), washed.scores()
        honest = [hotkey for hotkey, miner in plain.miners.items() if miner.kind == "honest"]
        gains += [after[hotkey].score / before[hotkey].score for hotkey in honest]
        faces.append(pay(washed)["two-faced"])
    return [
        Figure(what="score of an honest miner, with over without", value=max(gains), bound=1.0),
        Figure(what="pay of a two-faced one", value=float(np.mean(faces)), bound=0.60),
    ]


def p8_slander(scale: float, seed: int) -> list[Figure]:
    """Few slanderers lower nobody."""
    figures = []
    for slanderers, owners, bound in ((1, 8, 0.01), (3, 16, 0.05)):
        lying = [Owner(slanders=frozenset({"victim"}))] * slanderers
        runs = []
        for some in ([Owner()] * slanderers, lying):
            miners = _honest(log_uniform(MINERS - 8, 1, seed))
            victims = [Miner(kind="victim", capacity_bytes_per_s=CAPACITY / 3)] * 8
            others = [Owner()] * (owners - slanderers)
            runs.append(Subnet([*miners, *victims], seed=seed, owners=[*some, *others]))
        changes = []
        for subnet in runs:
            subnet.run(12)  # the ramp, in which all miners are known by too few measurements
        for _ in range(max(2, round(20 * scale))):
            for subnet in runs:
                subnet.run(10)
            before, after = (subnet.scores() for subnet in runs)
            changes += [abs(after[key].weight / before[key].weight - 1) for key in before]
        what = f"{slanderers} of {owners} owners, after the ramp: largest change of a weight"
        figures.append(Figure(what=what, value=max(changes), bound=bound))
    return figures


def p9_slow_peers(scale: float, seed: int) -> list[Figure]:
    """Slow peers are not taken for slow miners."""
    drops = []
    for run in range(max(1, round(10 * scale))):
        capacities = log_uniform(MINERS, 2, seed + run)
        taus = []
        for slow_peers in (0, 2):
            owners = [Owner(slow_peers=slow_peers)] * 8
            subnet = Subnet(_honest(capacities), seed=seed + run, owners=owners)
            subnet.run(40)
            scored = subnet.scores()
            taus.append(kendall_tau(capacities, [scored[key].weight for key in subnet.miners]))
        drops.append(taus[0] - taus[1])
    what = "half of the peers at a tenth of the speed: drop of Kendall tau"
    return [Figure(what=what, value=max(drops), bound=0.02)]


def _windows_until(subnet: Subnet, kind: str, reached: Callable[[float], bool]) -> float:
    for window in range(1, 100):
        subnet.run(1)
        if reached(pay(subnet)[kind]):
            return window
    return float("inf")


def p10_changes(scale: float, seed: int) -> list[Figure]:
    """The score follows what changes."""
    del scale  # short as it is
    start = 30
    honest = _honest([CAPACITY] * MINERS, 0.0)

    def subnet(**habits: float) -> Subnet:
        changed = Miner(kind="changed", capacity_bytes_per_s=CAPACITY, timeouts=0.0, **habits)  # type: ignore[arg-type]
        made = Subnet([*honest, *[changed] * 16], seed=seed)
        made.run(start)
        return made

    # Pay is per present capacity: after a doubling it starts at a half.
    return [
        Figure(
            what="windows until a newcomer has 90 % of its share",
            value=_windows_until(subnet(joins=start), "changed", lambda value: value >= 0.9),
            bound=14,
        ),
        Figure(
            what="windows until a doubled capacity shows 90 % of the gain",
            value=_windows_until(subnet(grows=start), "changed", lambda value: value >= 0.95),
            bound=11,
        ),
        Figure(
            what="windows until a dead miner has lost 90 %",
            value=_windows_until(subnet(leaves=start), "changed", lambda value: value <= 0.1),
            bound=11,
        ),
        Figure(
            what="windows until a dead miner has nothing",
            value=_windows_until(subnet(leaves=start), "changed", lambda value: value == 0),
            bound=11,
        ),
    ]


def p11_validators(scale: float, seed: int) -> list[Figure]:
    """Validators that measure on their own agree."""
    capacities = log_uniform(MINERS, 2, seed)
    one, other = (Subnet(_honest(capacities, 0.0), seed=seed + number) for number in range(2))
    angles = []
    for _ in range(max(2, round(20 * scale))):
        for subnet in (one, other):
            subnet.run(10)
        angles.append(cosine(weights(one.scores()), weights(other.scores())))
    what = "two validators: least cosine of their weights"
    return [Figure(what=what, value=min(angles[1:]), bound=0.995, at_least=True)]


PROPERTIES: Final[dict[str, Callable[[float, int], list[Figure]]]] = {
    "P1 order": p1_order,
    "P2 cheating": p2_cheating,
    "P3 timeouts": p3_timeouts,
    "P4 Sybils, one address": p4_sybils,
    "P4 Sybils, hidden": p4_hidden_sybils,
    "P5 two-faced": p5_two_faced,
    "P6 washing": p6_washing,
    "P8 slander": p8_slander,
    "P9 slow peers": p9_slow_peers,
    "P10 changes": p10_changes,
    "P11 validators": p11_validators,
}
