"""A subnet in numbers: parties of every kind, measured and scored by the shipped modules.

Knows capacities, habits and chances. Knows nothing of networks or time, and holds no copy of the
formula: `mapreduce.core` scores. Each window and purpose draws its own random numbers, so that two
runs of one seed differ by what was changed and by nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mapreduce.core.attribution import flagged
from mapreduce.core.goodput import relative_rates
from mapreduce.core.scoring import (
    Components,
    OwnerSeen,
    ScoringConfig,
    Seen,
    Standing,
    advance,
    score_all,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JOBS: Final = 24  # jobs of a miner in a window, in each of which it may cheat
NOISE_SD: Final = 0.10  # of a measurement; FlashFlow's accuracy is about .055
TIMEOUTS: Final = 0.01
LATENCY_S: Final = 0.05

_DRAWS: Final = 512  # in a window: the same whether a miner is there or not
_PEERS: Final = 4  # of a real job
_CREW: Final = 8  # miners of a real job
_FAKE_JOBS: Final = 10  # that an owner makes up for a miner it praises, in a window
_SLANDER: Final = 0.05  # of the true rate: what a slanderer says


@dataclass(frozen=True, slots=True, kw_only=True)
class Miner:
    """A miner's capacity and habits. Those of one `pipe` share its capacity, those of one `network`
    are a cluster to the validator; empty: its own."""

    kind: str
    capacity_bytes_per_s: float
    timeouts: float = TIMEOUTS
    speed_for_users: float = 1.0  # over its speed for bots
    cheats: float = 0.0  # share of its jobs
    detected: float = 0.0  # chance that one such job is proven
    pipe: str = ""
    network: str = ""
    joins: int = 0
    leaves: float = math.inf
    grows: float = math.inf  # the window from which its capacity is twice as large

    def capacity(self, window: int) -> float:
        """Bytes per second in a window; 0 when it is not there."""
        if not self.joins <= window < self.leaves:
            return 0.0
        return self.capacity_bytes_per_s * (2 if window >= self.grows else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """An owner of real jobs: the kinds of miners that it lies about, and how fast its peers are."""

    praises: frozenset[str] = frozenset()
    slanders: frozenset[str] = frozenset()
    slow_peers: int = 0  # of the four of its jobs, at a tenth of the others' speed


class Subnet:
    """Miners `m000`, `m001`, ... and what one validator, drawn by `seed`, remembers of them."""

    def __init__(
        self,
        miners: Sequence[Miner],
        *,
        seed: int,
        owners: Sequence[Owner] = (),
        noise_sd: float = NOISE_SD,
        jobs_per_miner: int = 3,  # real ones, in a window, if there are owners
        config: ScoringConfig | None = None,
    ) -> None:
        self.config = config or ScoringConfig()
        self.miners = {f"m{index:03}": miner for index, miner in enumerate(miners)}
        self.standings = {hotkey: Standing() for hotkey in self.miners}
        self.windows = 0
        self._seed = seed
        self._owners = owners
        self._noise_sd = noise_sd
        self._jobs_per_miner = jobs_per_miner
        self._ban_windows = round(self.config.ban_s / self.config.window_s)
        self._banned_until: dict[str, int] = {}
        self._disputed: frozenset[str] = frozenset()
        self.pipes = Counter(miner.pipe for miner in miners if miner.pipe)
        self._clusters = {key: miner.network or key for key, miner in self.miners.items()}
        # A peer's link is twice what the middle miner carries: the bottleneck of fast ones only.
        self._link = 2 * float(np.median([miner.capacity_bytes_per_s for miner in miners]))

    def run(self, windows: int) -> None:
        """Let that many windows pass."""
        for _ in range(windows):
            self._pass_window()

    def scores(self) -> dict[str, Components]:
        """What the validator makes, after the last window, of all that have joined."""
        last = self.windows - 1
        return score_all(
            {
                hotkey: standing
                for hotkey, standing in self.standings.items()
                if self.miners[hotkey].joins <= last
            },
            banned=dict.fromkeys(self._banned(last), "proof"),
            disputed=self._disputed,
            clusters=self._clusters,
            cap_bytes_per_s=math.inf,
            config=self.config,
        )

    def _banned(self, window: int) -> set[str]:
        return {hotkey for hotkey, until in self._banned_until.items() if window < until}

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self.windows, purpose])

    def _pass_window(self) -> None:
        banned = self._banned(self.windows)
        draws = self._random(0).random(_DRAWS)
        for (hotkey, miner), draw in zip(self.miners.items(), draws, strict=False):
            caught = 1 - (1 - miner.cheats * miner.detected) ** JOBS
            if draw < caught and hotkey not in banned:
                self._banned_until[hotkey] = self.windows + self._ban_windows
                banned.add(hotkey)
        hired = [
            hotkey
            for hotkey, miner in self.miners.items()
            if miner.joins <= self.windows and hotkey not in banned
        ]
        goodputs, latencies = self._slots(hired)
        heard = self._real_jobs(hired) if self._owners else {}
        for hotkey in hired:
            worked = goodputs[hotkey] > 0
            seen = Seen(
                goodputs_bytes_per_s=(goodputs[hotkey],),
                completed=float(worked),
                failed=float(not worked),
                latencies_s=(latencies[hotkey],) if worked else (),
                owners=heard.get(hotkey, {}),
            )
            self.standings[hotkey] = advance(self.standings[hotkey], seen, self.config)
        self.windows += 1

    def _slots(self, hired: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Goodput and latency of one slot each; a cluster is measured at once, others alone."""
        rng = self._random(1)
        luck, noise, late = rng.random(_DRAWS), rng.normal(size=_DRAWS), rng.normal(size=_DRAWS)
        measured, latencies = {}, {}
        drawn: dict[str, int] = {}
        for index, (hotkey, miner) in enumerate(self.miners.items()):
            line = drawn.setdefault(
                miner.pipe or hotkey, index
            )  # noise is of the line, not the uid
            at_once = self.pipes[miner.pipe] if miner.pipe and miner.network else 1
            capacity = miner.capacity(self.windows) / at_once
            if capacity and luck[index] >= miner.timeouts:
                measured[hotkey] = capacity * math.exp(self._noise_sd * noise[line])
            latencies[hotkey] = LATENCY_S * math.exp(self._noise_sd * late[index])
        return {hotkey: measured.get(hotkey, 0.0) for hotkey in hired}, latencies

    def _real_jobs(self, hired: Sequence[str]) -> dict[str, dict[str, OwnerSeen]]:
        """What the owners' jobs of this window bring, by miner and owner. Each job has some of the
        miners, and the owners take turns."""
        rng, there, names = self._random(2), set(hired), list(self.miners)
        crews: list[list[str]] = []
        for _ in range(self._jobs_per_miner):
            order = [names[index] for index in rng.permutation(len(names))]
            order = [hotkey for hotkey in order if hotkey in there]
            crews += [order[at : at + _CREW] for at in range(0, len(order), _CREW)]
        heard: dict[str, dict[str, OwnerSeen]] = defaultdict(dict)
        disputes = []
        for turn, crew in enumerate(crews, int(rng.integers(len(self._owners)))):
            number = turn % len(self._owners)
            owner, name = self._owners[number], f"owner-{number}"
            for hotkey, told in self._job(owner, crew, rng).items():
                heard[hotkey][name] = _together(heard[hotkey].get(name, OwnerSeen()), told)
                if self.miners[hotkey].kind in owner.slanders:
                    disputes.append((name, hotkey))
        self._disputed = flagged(disputes, len(self._owners), len(hired)).miners
        return heard

    def _job(
        self, owner: Owner, crew: Sequence[str], rng: np.random.Generator
    ) -> dict[str, OwnerSeen]:
        """What the peers of one real job tell of its miners."""
        luck = rng.random(_CREW)
        noise = np.exp(self._noise_sd * rng.normal(size=(_PEERS, _CREW)))
        links = np.where(np.arange(_PEERS) < owner.slow_peers, 0.1, 1.0) * self._link
        failed, rates = set(), {}
        for column, hotkey in enumerate(crew):
            miner = self.miners[hotkey]
            slandered = miner.kind in owner.slanders
            speed = miner.capacity(self.windows) * miner.speed_for_users
            speed /= self.pipes[miner.pipe] if miner.pipe else 1  # its others work as well
            if luck[column] < miner.timeouts or not speed or slandered:
                failed.add(hotkey)
            for peer, link in enumerate(links):
                rate = min(speed, float(link)) * float(noise[peer, column])
                rates[peer, hotkey] = rate * (_SLANDER if slandered else 1.0)
        known = {hotkey: self.standings[hotkey].goodput_bytes_per_s or 0.0 for hotkey in crew}
        ratios = relative_rates(rates, known, self.config)
        told = {}
        for hotkey in crew:
            if self.miners[hotkey].kind in owner.praises:
                told[hotkey] = OwnerSeen(completed=_FAKE_JOBS, ratios=(1.0,) * _FAKE_JOBS)
            else:
                told[hotkey] = OwnerSeen(
                    completed=float(hotkey not in failed),
                    failed=float(hotkey in failed),
                    ratios=(ratios[hotkey],) if hotkey in ratios else (),
                )
        return told


def _together(one: OwnerSeen, other: OwnerSeen) -> OwnerSeen:
    return OwnerSeen(
        completed=one.completed + other.completed,
        failed=one.failed + other.failed,
        ratios=one.ratios + other.ratios,
    )


def log_uniform(count: int, decades: float, seed: int) -> list[float]:
    """Capacities in bytes per second, downwards from 1 Gbit/s."""
    return list(125e6 * 10.0 ** -np.random.default_rng(seed).uniform(0, decades, count))


def pay(subnet: Subnet) -> dict[str, float]:
    """Weight per capacity of each kind of miner, as a multiple of what the kind "honest" gets.

    A shared pipe is one capacity. Who is gone is still compared with what it had.
    """
    scored, last = subnet.scores(), subnet.windows - 1
    weight: defaultdict[str, float] = defaultdict(float)
    capacity: defaultdict[str, float] = defaultdict(float)
    for hotkey, parts in scored.items():
        miner = subnet.miners[hotkey]
        sharing = subnet.pipes[miner.pipe] if miner.pipe else 1
        weight[miner.kind] += parts.weight
        capacity[miner.kind] += (miner.capacity(last) or miner.capacity_bytes_per_s) / sharing
    fair = weight["honest"] / capacity["honest"]
    return {kind: weight[kind] / capacity[kind] / fair for kind in capacity}


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two orders agree: 1 if in all pairs, -1 if in none."""
    signs = [
        np.sign(np.subtract.outer(np.asarray(values), np.asarray(values)))
        for values in (one, other)
    ]
    return float((signs[0] * signs[1]).sum() / (len(one) * (len(one) - 1)))


def cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Of the angle between two weight vectors."""
    product = math.fsum(one[key] * other.get(key, 0.0) for key in one)
    return product / (math.hypot(*one.values()) * math.hypot(*other.values()))


def deterrence(cheats: float, detected: float, ban_windows: int) -> float:
    """Long-run pay of a cheater over that of an honest miner, by renewal.

    In a window it is caught with the chance p, in the one that it is caught in it gets nothing, nor
    in the rest of the ban: it is paid for (1 - p) / p windows in each (1 - p) / p + `ban_windows`.
    """
    caught = 1 - (1 - cheats * detected) ** JOBS
    return (1 - caught) / (1 - caught + caught * ban_windows)
