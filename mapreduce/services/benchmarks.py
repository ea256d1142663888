"""The benchmarks of a validator: which bots are free, which miners are measured when, and what came
of it.

Knows the routes that bots call. Does not know how a report is judged (`slots.py`), nor what a
measurement is worth (`scorer.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.core.clusters import clusters
from mapreduce.errors import MapReduceError, Refused
from mapreduce.net.server import BODY, CALLER, json_response
from mapreduce.services.recruiter import FRESH_METAGRAPH_S
from mapreduce.services.slots import FIRST_ESTIMATE_BYTES_PER_S, STILL_RISING, judge, slot_size
from mapreduce.store.history import Measurement
from mapreduce.wire.benchmarks import Benchmark, BenchmarkAnswer, BenchmarkReport, NextBenchmark
from mapreduce.wire.messages import Accepted, decode_message

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from aiohttp import web

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.services.coordinator import Coordinator
    from mapreduce.services.neuron import Directory
    from mapreduce.services.recruiter import Recruiter
    from mapreduce.services.slots import Verdict
    from mapreduce.store.history import History
    from mapreduce.wire.messages import MinerAddress

GATHER_S = 3.0  # for bots that have just finished another benchmark
FORGET_BOT_S = 90.0  # after its last sign of life: no slot waits for it any more
JOIN_TIMEOUT_S = 20.0
STEP_TIMEOUT_S = 30.0  # a miner this much slower than its estimate has failed
REPORT_S = 15.0  # from the end of a slot to the last report: jobs are audited before they close
ALIKE = 4.0  # miners of one slot differ by no more than this, or the slow ones get too little
MAX_RETRIES = 4  # of a miner whose slot said nothing, or that was busy; and of one still rising
DAY_S = 86400.0

_RANDOM = random.SystemRandom()  # nobody may know when a miner is measured
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Slot:
    """A benchmark under way, and the reports that have come, by rank."""

    bots: list[str]
    reports: dict[int, BenchmarkReport] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Due:
    """A cluster that is still to be measured in this round."""

    miners: list[MinerAddress]
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkLimits:
    """Who may be a bot, and what benchmarks may take: `max_bytes_per_s` of all bots together in
    one direction, `bytes_per_day` in both, `seconds` of a slot."""

    bots: frozenset[str]
    max_bytes_per_s: float
    bytes_per_day: int
    seconds: float


class Benchmarks:
    """The routes that bots call, and the rounds. `estimates` by hotkey, bytes/s in and out, is what
    miners were last measured at."""

    def __init__(
        self,
        coordinator: Coordinator,
        recruiter: Recruiter,
        directory: Directory,
        history: History,
        limits: BenchmarkLimits,
        config: ScoringConfig,
    ) -> None:
        self.estimates: dict[str, float] = {}
        self._coordinator = coordinator
        self._recruiter = recruiter
        self._directory = directory
        self._history = history
        self._limits = limits
        self._config = config
        self._free: dict[str, asyncio.Future[Benchmark]] = {}
        # All of them are given the time to come after a restart.
        self._seen_at = dict.fromkeys(limits.bots, asyncio.get_running_loop().time())
        self._slots: dict[str, _Slot] = {}
        self._asked = asyncio.Event()
        self._told_of_budget = False

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/benchmarks/next", self._next)
        app.router.add_post("/v1/benchmarks/report", self._reported)

    @property
    def cap_bytes_per_s(self) -> float:
        """The most that can be measured of a miner: goodput, in and out."""
        return 2 * self._limits.max_bytes_per_s / self._config.capacity_ratio

    # Bots -----------------------------------------------------------------------------------------

    def _bot(self, request: web.Request) -> str:
        caller = request[CALLER]
        if caller.is_session_key or caller.address not in self._limits.bots:
            raise Refused(
                f"{caller.address} is no benchmark bot of this validator: add it to "
                "benchmark_hotkeys in validator.config.json",
                code="not_a_bot",
                status=403,
            )
        address: str = caller.address
        self._seen_at[address] = asyncio.get_running_loop().time()
        return address

    async def _next(self, request: web.Request) -> web.Response:
        bot = self._bot(request)
        wait_s = decode_message(NextBenchmark, request[BODY]).wait_s
        future: asyncio.Future[Benchmark] = asyncio.get_running_loop().create_future()
        if (before := self._free.get(bot)) is not None:
            before.cancel()  # it asks again, or runs twice: only one of them can be told
        self._free[bot] = future
        self._asked.set()
        try:
            await asyncio.wait([future], timeout=wait_s)
            told = future.result() if future.done() and not future.cancelled() else None
            return json_response(BenchmarkAnswer(benchmark=told))
        finally:
            if self._free.get(bot) is future:
                del self._free[bot]

    async def _reported(self, request: web.Request) -> web.Response:
        bot = self._bot(request)
        report = decode_message(BenchmarkReport, request[BODY])
        slot = self._slots.get(report.job)
        # A report of a slot that is over, or that an earlier process began, is taken and forgotten.
        if slot is not None:
            if report.rank >= len(slot.bots) or slot.bots[report.rank] != bot:
                raise Refused("the report is of another bot's rank", code="not_yours", status=403)
            slot.reports[report.rank] = report
            if len(slot.reports) == len(slot.bots):
                slot.complete.set()
        return json_response(Accepted(job=report.job))

    async def _gather_bots(self) -> list[str]:
        """The free bots, at least one, once those that were seen lately had time to come."""
        while not self._free:
            self._asked.clear()
            await self._asked.wait()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GATHER_S
        while loop.time() < deadline:
            since = loop.time() - FORGET_BOT_S
            if all(bot in self._free for bot, at in self._seen_at.items() if at > since):
                break
            await asyncio.sleep(0.1)
        free = list(self._free)
        _RANDOM.shuffle(free)
        return free

    # Rounds ---------------------------------------------------------------------------------------

    async def run_round(self, window: int, until: float, done: Collection[str]) -> bool:
        """Measures every miner once, but for those in `done`, spread over the time until `until`
        (Unix seconds): no miner can tell when its turn is. Returns whether there were any, and
        all had their turn."""
        banned = self._recruiter.banned()
        due = [
            _Due(cluster)
            for cluster in await self._clusters()
            if any(m.hotkey not in done and m.hotkey not in banned for m in cluster)
        ]
        _RANDOM.shuffle(due)
        any_due = bool(due) or bool(done)
        while due:
            slots_left = len(due)
            spare_s = until - time.time() - slots_left * 2 * self._limits.seconds
            if spare_s > 0:
                # Between events of a Poisson process, with time to spare at the end.
                await asyncio.sleep(min(_RANDOM.expovariate(2 * slots_left / spare_s), spare_s))
            try:
                async with asyncio.timeout(until - time.time()):
                    bots = await self._gather_bots()
            except TimeoutError:
                return False
            chosen = self._pack(due, len(bots))
            if not self._within_budget(chosen):
                return False
            due = [entry for entry in due if entry not in chosen]
            due += await self._measure(window, bots, chosen)
        return any_due

    async def _clusters(self) -> list[list[MinerAddress]]:
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
        together: dict[str, list[MinerAddress]] = {}
        for miner in miners:
            together.setdefault(cluster_of.get(miner.hotkey, miner.hotkey), []).append(miner)
        return list(together.values())

    async def cluster_of(self, miners: Collection[str]) -> dict[str, str]:
        """Hotkey to cluster, of these miners; neurons that are none make nobody a neighbour."""
        metagraph = await self._directory.metagraph(FRESH_METAGRAPH_S)
        return clusters(
            (n.hotkey, n.coldkey, n.ip) for n in metagraph.neurons if n.hotkey in miners
        )

    def _estimate(self, miner: MinerAddress) -> float:
        return self.estimates.get(miner.hotkey) or FIRST_ESTIMATE_BYTES_PER_S

    def _pack(self, due: list[_Due], bot_count: int) -> list[_Due]:
        """The next slot: one cluster, and more up to as many miners as there are ranks, as users'
        jobs have, while the bots can outrun them all."""
        chosen = [due[0]]
        miners = list(due[0].miners)
        most = 2 * self._limits.max_bytes_per_s / self._config.capacity_ratio
        for entry in due[1:]:
            together = [self._estimate(m) for m in (*miners, *entry.miners)]
            fits = len(together) <= bot_count and sum(together) <= most
            if fits and max(together) <= ALIKE * min(together):
                chosen.append(entry)
                miners += entry.miners
        return chosen

    def _within_budget(self, chosen: list[_Due]) -> bool:
        limits = self._limits
        planned = limits.seconds * sum(self._estimate(m) for entry in chosen for m in entry.miners)
        spent = self._history.traffic_since(time.time() - DAY_S)
        within = spent + planned <= limits.bytes_per_day
        if not within and not self._told_of_budget:
            _log.warning(
                "benchmarks pause: benchmark.bytes_per_day is used up",
                extra={"bytes": spent, "limit": limits.bytes_per_day},
            )
        self._told_of_budget = not within
        return within

    async def _measure(self, window: int, bots: list[str], chosen: list[_Due]) -> list[_Due]:
        """Runs one slot and keeps what it says; returns what is to be measured once more."""
        miners = [miner for entry in chosen for miner in entry.miners]
        before = {miner.hotkey: self._estimate(miner) for miner in miners}
        verdicts, busy, job = await self._run_slot(bots, miners)
        again, rows = [], []
        for entry in chosen:
            rising = any(
                verdicts[m.hotkey].goodput_bytes_per_s > STILL_RISING * before[m.hotkey]
                for m in entry.miners
            )
            void = all(verdicts[m.hotkey].outcome == "void" for m in entry.miners)
            no_room = any(m.hotkey in busy for m in entry.miners)
            retry = (rising or void or no_room) and entry.retries < MAX_RETRIES
            if retry:
                again.append(_Due(entry.miners, entry.retries + 1))
            for miner in entry.miners:
                verdict = verdicts[miner.hotkey]
                outcome, reason = verdict.outcome, verdict.reason
                if retry and (outcome == "measured" or miner.hotkey in busy):
                    outcome, reason = "void", reason or "faster than its estimate"
                    reason += "; measured once more"
                if not no_room:
                    self._learn(miner, verdict)
                rows.append(
                    Measurement(
                        at=time.time(),
                        window=window,
                        job=job,
                        hotkey=miner.hotkey,
                        outcome=outcome,
                        goodput_bytes_per_s=verdict.goodput_bytes_per_s
                        if outcome == "measured"
                        else 0.0,
                        latency_s=verdict.latency_s,
                        seconds=verdict.seconds,
                        bytes=verdict.bytes,
                        reason=reason[:256],
                    )
                )
                _log.info(
                    "miner measured",
                    extra={
                        "uid": miner.uid,
                        "outcome": outcome,
                        "mbit_per_s": round(verdict.goodput_bytes_per_s * 4e-6, 1),
                        "seconds": round(verdict.seconds, 1),
                        "reason": reason,
                    },
                )
        self._history.add_slot(rows)
        return again

    def _learn(self, miner: MinerAddress, verdict: Verdict) -> None:
        if verdict.outcome == "measured":
            self.estimates[miner.hotkey] = verdict.goodput_bytes_per_s
        elif verdict.outcome == "failed" and miner.hotkey in self.estimates:
            self.estimates[miner.hotkey] /= 2  # it may be too slow for the size, and only that

    async def _run_slot(
        self, bots: list[str], miners: list[MinerAddress]
    ) -> tuple[Mapping[str, Verdict], Collection[str], str]:
        """The verdicts by hotkey, who had no room, and the job, empty if none came of it."""
        limits = self._limits
        size = slot_size(
            [self._estimate(miner) for miner in miners],
            len(bots),
            seconds=limits.seconds,
            max_bytes_per_s=limits.max_bytes_per_s,
            chance=_RANDOM.random(),
        )
        name = os.urandom(16).hex()
        slot = self._slots[name] = _Slot(bots)
        chosen = self._coordinator.choose(name, miners)
        seed, broadcast = os.urandom(32).hex(), _RANDOM.random() < 0.5
        try:
            for rank, bot in enumerate(bots):
                told = Benchmark(
                    job=name,
                    rank=rank,
                    peer_count=len(bots),
                    tensor_bytes=size.tensor_bytes,
                    seed=seed,
                    broadcast=broadcast,
                    steps=size.steps,
                    seconds=limits.seconds,
                    bytes_per_s=size.bytes_per_s,
                    join_timeout_s=JOIN_TIMEOUT_S,
                    step_timeout_s=STEP_TIMEOUT_S,
                )
                free = self._free.pop(bot, None)
                if free is not None and not free.done():
                    free.set_result(told)
            longest_s = JOIN_TIMEOUT_S + 4 * limits.seconds + STEP_TIMEOUT_S + REPORT_S
            try:
                async with asyncio.timeout(longest_s):
                    await slot.complete.wait()
            except TimeoutError:
                missing = [bot for r, bot in enumerate(bots) if r not in slot.reports]
                _log.warning("bots do not report", extra={"bots": missing})
        finally:
            del self._slots[name]
            self._coordinator.forget(name)
        verdicts = judge(
            {miner.uid: miner.hotkey for miner in miners},
            slot.reports,
            len(bots),
            refused=chosen.refused,
            clusters=await self.cluster_of({miner.hotkey for miner in miners}),
            config=self._config,
        )
        return verdicts, chosen.busy, chosen.job
