"""What real jobs say of their miners: who was lost, and how fast each was beside the others.

Knows completions and reports of peers, which are their own word: nothing here can raise a score
(`core/standing.py` weighs it). Does not know benchmarks, routes or clocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.core.goodput import relative_rates
from mapreduce.core.partition import MIN_SEGMENT_BYTES
from mapreduce.store.history import Outcome
from mapreduce.wire.statements import Completion

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.store.history import History
    from mapreduce.wire.messages import Grant, GrantedJob

MAX_JOBS = 1024  # the least recently heard of goes first
STRANGERS = "peers without registration"  # keys cost nothing: together they are one owner


@dataclass(slots=True)
class _Traffic:
    nbytes: int = 0
    us: int = 0


@dataclass(slots=True)
class _Job:
    """What the ranks of a job have told, by index."""

    owner: str
    miners: list[str]
    peer_count: int
    told: dict[int, int] = field(default_factory=dict)  # the last step that each rank told of
    committed: bool = False  # a step since the last settlement
    traffic: dict[tuple[int, int], _Traffic] = field(default_factory=dict)  # (rank, miner)
    lost: dict[int, set[int]] = field(default_factory=dict)  # miner to the ranks that say so
    blamed: set[int] = field(default_factory=set)  # miners whose loss was counted: once is enough


class Organic:
    """The real jobs of one validator. `bots` are hotkeys whose jobs are benchmarks."""

    def __init__(self, history: History, bots: Collection[str], config: ScoringConfig) -> None:
        self.coldkeys: Mapping[str, str] = {}  # of registered hotkeys
        self._history = history
        self._bots = bots
        self._config = config
        self._jobs: OrderedDict[str, _Job] = OrderedDict()

    def owner(self, hotkey: str) -> str:
        """Who answers for a peer: its coldkey, or all strangers together."""
        return self.coldkeys.get(hotkey, STRANGERS)

    def _job(self, granted: GrantedJob, grant: Grant) -> _Job | None:
        if any(member.hotkey in self._bots for member in granted.members):
            return None
        job = self._jobs.get(grant.job)
        if job is None:
            job = self._jobs[grant.job] = _Job(
                owner=self.owner(granted.members[0].hotkey),
                miners=[miner.hotkey for miner in grant.miners],
                peer_count=len(grant.session_keys),
            )
            while len(self._jobs) > MAX_JOBS:
                self._jobs.popitem(last=False)
        self._jobs.move_to_end(grant.job)
        return job

    def completed(self, granted: GrantedJob, grant: Grant, said: Completion) -> None:
        """A rank tells how a step ended, in the order of steps; what it told before is ignored."""
        job = self._job(granted, grant)
        if job is None or said.step <= job.told.get(said.rank, 0):
            return
        job.told[said.rank] = said.step
        if said.outcome != Completion.COMMITTED:
            return
        job.committed = True
        for miner, segment in enumerate(said.segments):
            # Smaller ones time nothing but the scheduler.
            if segment.nbytes >= MIN_SEGMENT_BYTES and segment.segment_us > 0:
                traffic = job.traffic.setdefault((said.rank, miner), _Traffic())
                traffic.nbytes += segment.nbytes
                traffic.us += segment.segment_us

    def lost(self, granted: GrantedJob, grant: Grant, rank: int, uids: Collection[int]) -> None:
        """A rank tells which miners it has lost."""
        job = self._job(granted, grant)
        if job is not None:
            for index, miner in enumerate(grant.miners):
                if miner.uid in uids:
                    job.lost.setdefault(index, set()).add(rank)

    def settle(self, now: float, goodputs: Mapping[str, float]) -> list[Outcome]:
        """What jobs have shown since the last time, which the history keeps too. `goodputs` by
        hotkey is what the bots have measured. Jobs of few ranks say nothing: there one rank's word
        would decide."""
        outcomes = []
        for name, job in self._jobs.items():
            if job.peer_count < self._config.organic_peers:
                continue
            rates = {
                pair: traffic.nbytes / (traffic.us * 1e-6) for pair, traffic in job.traffic.items()
            }
            known = {
                miner: goodputs[hotkey]
                for miner, hotkey in enumerate(job.miners)
                if hotkey in goodputs
            }
            ratios = relative_rates(rates, known, self._config)
            for miner, hotkey in enumerate(job.miners):
                failed = 2 * len(job.lost.get(miner, ())) > job.peer_count
                if miner in job.blamed or not (failed or job.committed):
                    continue
                if failed:
                    job.blamed.add(miner)
                outcomes.append(
                    Outcome(
                        job=name,
                        owner=job.owner,
                        hotkey=hotkey,
                        completed=int(not failed),
                        failed=int(failed),
                        ratio=ratios.get(miner),
                        at=now,
                    )
                )
            job.traffic.clear()
            job.committed = False
        self._history.add_outcomes(outcomes)
        return outcomes
