"""The benchmark bots of a validator: which are free, and how they measure some miners together.

Knows the routes that bots call. Does not know which miners are measured when (`rounds.py`), nor how
a report is judged (`slots.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.errors import Refused
from mapreduce.net.server import BODY, CALLER, json_response
from mapreduce.services.slots import judge, slot_size
from mapreduce.wire.benchmarks import Benchmark, BenchmarkAnswer, BenchmarkReport, NextBenchmark
from mapreduce.wire.messages import Accepted, decode_message

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from aiohttp import web

    from mapreduce.core.scoring_config import ScoringConfig
    from mapreduce.services.coordinator import Coordinator
    from mapreduce.services.slots import Verdict
    from mapreduce.wire.messages import MinerAddress

GATHER_S = 3.0  # for bots that have just finished another benchmark
FORGET_BOT_S = 90.0  # after its last sign of life: no slot waits for it any more
JOIN_TIMEOUT_S = 20.0
STEP_TIMEOUT_S = 30.0  # a miner this much slower than its estimate has failed
REPORT_S = 15.0  # from the end of a slot to the last report: jobs are audited before they close
LONGEST = 4  # times the seconds of a slot: that long it may last, with all that is not timed
TWICE_S = 1.0  # before a bot that runs twice under one hotkey is told to ask again

RANDOM = random.SystemRandom()  # nobody may know when a miner is measured, or how
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Slot:
    """A benchmark under way, and the reports that have come, by rank."""

    bots: list[str]
    reports: dict[int, BenchmarkReport] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkLimits:
    """Who may be a bot, and what benchmarks may take: `max_bytes_per_s` of all bots together in
    one direction, `bytes_per_day` in both, `seconds` of a slot."""

    bots: frozenset[str]
    max_bytes_per_s: float
    bytes_per_day: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotResult:
    """What a slot said, by hotkey; who had no room for it; and its job, empty if none came of
    it."""

    verdicts: Mapping[str, Verdict]
    busy: Collection[str]
    job: str


class Benchmarks:
    """The routes that bots call, and the slots that they run."""

    def __init__(
        self, coordinator: Coordinator, limits: BenchmarkLimits, config: ScoringConfig
    ) -> None:
        self.limits = limits
        self.draining = False
        self._coordinator = coordinator
        self._config = config
        self._free: dict[str, asyncio.Future[Benchmark]] = {}
        # All of them are given the time to come after a restart.
        self._seen_at = dict.fromkeys(limits.bots, asyncio.get_running_loop().time())
        self._slots: dict[str, _Slot] = {}
        self._asked = asyncio.Event()

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/benchmarks/next", self._next)
        app.router.add_post("/v1/benchmarks/report", self._reported)

    # Bots -----------------------------------------------------------------------------------------

    def _bot(self, request: web.Request) -> str:
        caller = request[CALLER]
        if caller.is_session_key or caller.address not in self.limits.bots:
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
            if future.cancelled():
                await asyncio.sleep(TWICE_S)
                return json_response(BenchmarkAnswer(benchmark=None))
            told = future.result() if future.done() else None
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

    def under_way(self) -> str | None:
        """Whether bots measure miners just now."""
        return "a benchmark" if self._slots else None

    async def gather(self) -> list[str]:
        """The free bots, at least one, once those that were seen lately had time to come."""
        loop = asyncio.get_running_loop()
        while True:
            while self.draining or not self._free:
                self._asked.clear()  # bots ask twice a minute: the end of draining is seen
                await self._asked.wait()
            deadline = loop.time() + GATHER_S
            while loop.time() < deadline:
                since = loop.time() - FORGET_BOT_S
                if all(bot in self._free for bot, at in self._seen_at.items() if at > since):
                    break
                await asyncio.sleep(0.1)
            if self._free:
                free = list(self._free)
                RANDOM.shuffle(free)
                return free

    # Slots ----------------------------------------------------------------------------------------

    async def run_slot(
        self, bots: list[str], miners: list[MinerAddress], estimates: list[float]
    ) -> SlotResult:
        """Has the bots measure these miners together; estimates are goodputs in bytes/s."""
        name = os.urandom(16).hex()
        slot = self._slots[name] = _Slot(bots)
        chosen = self._coordinator.choose(name, miners)
        limits = self.limits
        try:
            self._tell(name, bots, estimates)
            longest_s = JOIN_TIMEOUT_S + LONGEST * limits.seconds + STEP_TIMEOUT_S + REPORT_S
            try:
                async with asyncio.timeout(longest_s):
                    await slot.complete.wait()
            except TimeoutError:
                missing = [bot for rank, bot in enumerate(bots) if rank not in slot.reports]
                _log.warning("bots do not report", extra={"bots": missing})
        finally:
            del self._slots[name]
            self._coordinator.forget(name)
        verdicts = judge(
            {miner.uid: miner.hotkey for miner in miners},
            slot.reports,
            len(bots),
            refused=chosen.refused,
            seconds=limits.seconds,
            config=self._config,
        )
        return SlotResult(verdicts=verdicts, busy=chosen.busy, job=chosen.job)

    def _tell(self, name: str, bots: list[str], estimates: list[float]) -> None:
        """Tells each bot its part; one that has gone meanwhile does not come to the job."""
        limits = self.limits
        size = slot_size(
            estimates,
            len(bots),
            seconds=limits.seconds,
            max_bytes_per_s=limits.max_bytes_per_s,
            chance=RANDOM.random(),
            leisure=RANDOM.random(),
        )
        seed, broadcast = os.urandom(32).hex(), RANDOM.random() < 0.5
        for rank, bot in enumerate(bots):
            free = self._free.pop(bot, None)
            if free is None or free.done():
                continue
            free.set_result(
                Benchmark(
                    job=name,
                    rank=rank,
                    peer_count=len(bots),
                    tensor_bytes=size.tensor_bytes,
                    seed=seed,
                    broadcast=broadcast,
                    steps=size.steps,
                    seconds=limits.seconds,
                    longest_s=LONGEST * limits.seconds,
                    pause_s=size.pause_s,
                    bytes_per_s=size.bytes_per_s,
                    join_timeout_s=JOIN_TIMEOUT_S,
                    step_timeout_s=STEP_TIMEOUT_S,
                )
            )
