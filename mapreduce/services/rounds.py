"""Rounds: every miner of the subnet is measured once per window, at a time nobody can guess.

Knows who is due, who must be measured together, and what benchmarks may take. Does not know bots
(`benchmarks.py`), nor what a measurement is worth (`scorer.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mapreduce.core.clusters import clusters
from mapreduce.errors import MapReduceError
from mapreduce.services.benchmarks import RANDOM
from mapreduce.services.recruiter import FRESH_METAGRAPH_S
from mapreduce.services.slots import (
    FIRST_ESTIMATE_BYTES_PER_S,
    STILL_RISING,
    Outcome,
    Verdict,
)
from mapreduce.store.history import Measurement

if TYPE_CHECKING:
    from collections.abc import Collection

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.services.benchmarks import Benchmarks, SlotResult
    from mapreduce.services.neuron import Directory
    from mapreduce.services.recruiter import Recruiter
    from mapreduce.store.history import History
    from mapreduce.wire.messages import MinerAddress

ALIKE = 4.0  # miners of one slot differ by no more than this, or the slow ones get too little
MAX_TRIES = 3  # after the first, of a slot that says nothing, finds no room, or a faster miner
DAY_S = 86400.0

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Due:
    """Miners that are still to be measured in this round, together. `share` is the part of what
    they show that counts; `extra` ones have had their turn and only fill a slot."""

    miners: list[MinerAddress]
    tries: int = 0
    share: float = 1.0
    extra: bool = False


@dataclass(slots=True)
class _Round:
    window: int
    measured: set[str] = field(default_factory=set)  # proves that the bots work


class Rounds:
    """The measuring of one subnet. `estimates` by hotkey, bytes/s in and out, is what miners were
    last measured at."""

    def __init__(
        self,
        benchmarks: Benchmarks,
        recruiter: Recruiter,
        directory: Directory,
        history: History,
        config: ScoringConfig,
    ) -> None:
        self.estimates: dict[str, float] = {}
        self._benchmarks = benchmarks
        self._limits = benchmarks.limits
        self._recruiter = recruiter
        self._directory = directory
        self._history = history
        self._config = config
        self._turns: dict[str, int] = {}  # the window of each miner's last turn
        self._told_of_budget = False

    @property
    def cap_bytes_per_s(self) -> float:
        """The most that can be measured of a miner: goodput, in and out."""
        return 2 * self._limits.max_bytes_per_s / self._config.capacity_ratio

    async def run(self, window: int, until: float, done: Collection[str]) -> bool:
        """Measures every miner once, but for those in `done`, spread over the time until `until`
        (Unix seconds). Returns whether every miner has had a turn, be it in an earlier round."""
        together = await self._together()
        await self._fail_absent(window, done)
        self._turns.update(dict.fromkeys(done, window))
        banned = self._recruiter.banned()
        together = [[m for m in miners if m.hotkey not in banned] for miners in together]
        due = [_Due(miners) for miners in together if any(m.hotkey not in done for m in miners)]
        RANDOM.shuffle(due)  # and then whose turn was longest ago
        due.sort(key=lambda entry: min(self._turns.get(m.hotkey, -1) for m in entry.miners))
        this = _Round(window)
        while due:
            spare_s = until - time.time() - len(due) * 2 * self._limits.seconds
            if spare_s > 0:
                # Between events of a Poisson process, with time to spare at the end.
                await asyncio.sleep(min(RANDOM.expovariate(2 * len(due) / spare_s), spare_s))
            try:
                async with asyncio.timeout(until - time.time()):
                    bots = await self._benchmarks.gather()
            except TimeoutError:
                break
            chosen = self._pack(due, together, len(bots))
            if not self._within_budget(chosen):
                chosen = chosen[:1]
            due = [entry for entry in due if entry not in chosen]
            if self._within_budget(chosen):
                due += await self._measure(this, bots, chosen)
        return bool(together) and all(m.hotkey in self._turns for group in together for m in group)

    # Who is due -----------------------------------------------------------------------------------

    async def _together(self) -> list[list[MinerAddress]]:
        """All miners, those that must be measured at once together."""
        served = await self._recruiter.served()
        statuses = await asyncio.gather(*(self._recruiter.status(miner) for miner in served))
        miners = [
            miner
            for miner, status in zip(served, statuses, strict=True)
            # One that worked before and is silent now is measured, and fails.
            if not isinstance(status, MapReduceError) or miner.hotkey in self.estimates
        ]
        cluster_of = await self.cluster_of({miner.hotkey for miner in miners})
        found: dict[str, list[MinerAddress]] = {}
        for miner in miners:
            found.setdefault(cluster_of.get(miner.hotkey, miner.hotkey), []).append(miner)
        return list(found.values())

    async def cluster_of(self, miners: Collection[str]) -> dict[str, str]:
        """Hotkey to cluster, of these miners; neurons that are none make nobody a neighbour."""
        metagraph = await self._directory.metagraph(FRESH_METAGRAPH_S)
        return clusters(
            (n.hotkey, n.coldkey, n.ip) for n in metagraph.neurons if n.hotkey in miners
        )

    async def _fail_absent(self, window: int, done: Collection[str]) -> None:
        """A miner that worked before and serves no axon any more is no less absent than a dead
        one."""
        metagraph = await self._directory.metagraph(FRESH_METAGRAPH_S)
        absent = [
            n.hotkey
            for n in metagraph.neurons
            if n.ip is None and n.hotkey in self.estimates and n.hotkey not in done
        ]
        verdict = Verdict(outcome="failed", reason="serves no axon")
        self._history.add_slot([_row(window, "", hotkey, verdict) for hotkey in absent])
        self._turns.update(dict.fromkeys(absent, window))

    def _estimate(self, miner: MinerAddress) -> float:
        return self.estimates.get(miner.hotkey) or FIRST_ESTIMATE_BYTES_PER_S

    def _pack(
        self, due: list[_Due], together: list[list[MinerAddress]], bot_count: int
    ) -> list[_Due]:
        """The next slot: whoever is due first, and more up to as many miners as there are ranks, as
        users' jobs have, while the bots can outrun them all. Who has spoilt a slot is alone."""
        chosen = [due[0]]
        if due[0].tries:
            return chosen
        miners = list(due[0].miners)
        others = [entry for entry in due[1:] if not entry.tries]
        waiting = {m.hotkey for entry in due for m in entry.miners}
        spare = [
            _Due(group, extra=True)
            for group in together
            if group and not any(m.hotkey in waiting for m in group)
        ]
        RANDOM.shuffle(spare)
        for entry in (*others, *spare):
            rates = [self._estimate(m) for m in (*miners, *entry.miners)]
            fits = len(rates) <= bot_count and sum(rates) <= self.cap_bytes_per_s
            if fits and max(rates) <= ALIKE * min(rates):
                chosen.append(entry)
                miners += entry.miners
        return chosen

    def _within_budget(self, chosen: list[_Due]) -> bool:
        """Whether the bytes are left, in this window's part of the day or, for what is too large
        for that, in the day's."""
        rate = sum(self._estimate(m) for entry in chosen for m in entry.miners)
        planned = self._limits.seconds * min(rate, 2 * self._limits.max_bytes_per_s)
        now, window_s = time.time(), self._config.window_s
        lately = self._history.traffic_since(now - window_s)
        per_window = self._limits.bytes_per_day * window_s / DAY_S
        within = lately + planned <= per_window
        if not within and not lately:
            spent = self._history.traffic_since(now - DAY_S)
            within = spent + planned <= self._limits.bytes_per_day
        if not within and not self._told_of_budget:
            _log.warning(
                "benchmark.bytes_per_day is used up for now: miners wait for their turn",
                extra={"bytes": lately, "seconds": window_s},
            )
        self._told_of_budget = not within
        return within

    # Measuring ------------------------------------------------------------------------------------

    async def _measure(self, this: _Round, bots: list[str], chosen: list[_Due]) -> list[_Due]:
        """Runs one slot and keeps what it says; returns what is to be measured once more."""
        served = {miner.hotkey: miner for miner in await self._recruiter.served()}
        miners = [served.get(m.hotkey, m) for entry in chosen for m in entry.miners]
        estimates = [self._estimate(miner) for miner in miners]
        result = await self._benchmarks.run_slot(bots, miners, estimates)
        again: list[_Due] = []
        rows = []
        for entry in chosen:
            more = [] if entry.extra else self._once_more(entry, result)
            again += more
            waiting = {miner.hotkey for due in more for miner in due.miners}
            for miner in entry.miners:
                verdict = result.verdicts[miner.hotkey]
                if verdict.outcome == "measured":
                    this.measured.add(miner.hotkey)
                if miner.hotkey not in result.busy:
                    self._learn(miner, verdict)
                if miner.hotkey in waiting:
                    reason = f"{verdict.reason or 'faster than its estimate'}; measured once more"
                    verdict = _changed(verdict, "void", reason)
                elif (
                    verdict.outcome == "void" and not entry.extra and this.measured - {miner.hotkey}
                ):
                    # The bots work, and so does every other miner: it has had its tries.
                    reason = f"nothing measured in {entry.tries + 1} tries: {verdict.reason}"
                    verdict = _changed(verdict, "failed", reason)
                row = _row(this.window, result.job, miner.hotkey, verdict, entry.share)
                rows.append(row)
                if row.outcome != "void":
                    self._turns[miner.hotkey] = this.window
                _log.info(
                    "miner measured",
                    extra={
                        "uid": miner.uid,
                        "outcome": row.outcome,
                        "mbit_per_s": round(row.goodput_bytes_per_s * 4e-6, 1),
                        "seconds": round(row.seconds, 1),
                        "reason": row.reason,
                    },
                )
        self._history.add_slot(rows)
        return again

    def _once_more(self, entry: _Due, result: SlotResult) -> list[_Due]:
        """What of an entry is to be measured again.

        A cluster is measured together, without those who have failed, as often as it may; then each
        alone, for its part of what it shows: nobody gains by spoiling the slots of neighbours.
        """
        verdicts = result.verdicts
        failed = [
            m
            for m in entry.miners
            if verdicts[m.hotkey].outcome == "failed" and m.hotkey not in result.busy
        ]
        left = [miner for miner in entry.miners if miner not in failed]
        unclear = any(verdicts[m.hotkey].outcome == "void" or m.hotkey in result.busy for m in left)
        rising = any(
            verdicts[m.hotkey].goodput_bytes_per_s > STILL_RISING * self._estimate(m) for m in left
        )
        if not (unclear or rising):
            return []
        if entry.tries < MAX_TRIES:
            return [_Due(left, entry.tries + 1)]
        if unclear and len(left) > 1:
            return [_Due([miner], MAX_TRIES, entry.share / len(left)) for miner in left]
        return []

    def _learn(self, miner: MinerAddress, verdict: Verdict) -> None:
        if verdict.outcome == "measured":
            self.estimates[miner.hotkey] = verdict.goodput_bytes_per_s
        elif verdict.outcome == "failed" and miner.hotkey in self.estimates:
            self.estimates[miner.hotkey] /= 2  # it may be too slow for the size, and only that


def _changed(verdict: Verdict, outcome: Outcome, reason: str) -> Verdict:
    return replace(verdict, outcome=outcome, reason=reason, goodput_bytes_per_s=0.0)


def _row(window: int, job: str, hotkey: str, verdict: Verdict, share: float = 1.0) -> Measurement:
    return Measurement(
        at=time.time(),
        window=window,
        job=job,
        hotkey=hotkey,
        outcome=verdict.outcome,
        goodput_bytes_per_s=verdict.goodput_bytes_per_s * share,
        latency_s=verdict.latency_s,
        seconds=verdict.seconds,
        bytes=verdict.bytes,
        reason=verdict.reason[:256],
    )
