"""A benchmark bot: a peer that its validator tells which jobs to run, and that recomputes every
result.

Knows how a benchmark goes and whom to blame when it goes wrong. Does not know why this benchmark,
nor what its figures are worth.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mapreduce import __version__
from mapreduce.chain.wallets import load_wallet
from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp
from mapreduce.core.seeded import SeededTensor, first_difference
from mapreduce.errors import (
    IntegrityError,
    MapReduceError,
    MinerFraud,
    MinerLost,
    PeerTimeout,
    Refused,
    ResultDisputed,
    StepInDoubt,
    Unavailable,
)
from mapreduce.net.client import call, make_http_session
from mapreduce.net.pacing import Pacer
from mapreduce.services.joining import find_validator, open_job
from mapreduce.services.worker import Worker, supervised
from mapreduce.wire.benchmarks import (
    MAX_WHAT,
    Benchmark,
    BenchmarkAnswer,
    BenchmarkReport,
    Blame,
    NextBenchmark,
    SegmentTime,
)
from mapreduce.wire.bodies import TensorSpec
from mapreduce.wire.messages import Accepted
from mapreduce.wire.peer_step import Target
from mapreduce.wire.proofs import ProofInvalid, check_claim, encode_claim
from mapreduce.wire.recompute import prove_wrong_sum

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import aiohttp
    from bittensor.sp_core import Keypair

    from mapreduce.config import PeerConfig
    from mapreduce.net.client import Remote
    from mapreduce.services.peer_job import PeerJob
    from mapreduce.wire.peer_step import Step

WAIT_S = 30.0  # for the next benchmark; then the bot asks again
ANSWER_S = 10.0  # that the answer may come late
RETRY_S = (1.0, 30.0)  # between two attempts to reach the validator: the first, and the longest
REPORT_ATTEMPTS = 5
DRAINING_S = 0.2

_log = logging.getLogger(__name__)


class Bot:
    """One bot of one validator; `find_validator` looks up where that listens now. Proofs go to the
    validator, and for as long as the bot runs into `proof_directory`."""

    def __init__(
        self,
        key: Keypair,
        find_validator: Callable[[], Awaitable[Remote]],
        http: aiohttp.ClientSession,
        proof_directory: Path,
    ) -> None:
        self.draining = False
        self._measuring = False
        self._key = key
        self._find_validator = find_validator
        self._http = http
        self._proof_directory = proof_directory
        self._validator: Remote | None = None

    def under_way(self) -> str | None:
        """Whether this bot is in a benchmark."""
        return "a benchmark" if self._measuring else None

    async def run(self) -> None:
        """Runs one benchmark after the other, whatever happens to the validator."""
        retry_s = RETRY_S[0]
        while True:
            try:
                if self.draining:
                    await asyncio.sleep(DRAINING_S)
                    continue
                benchmark = await self._next()
                retry_s = RETRY_S[0]
                if benchmark is not None:
                    self._measuring = True
                    await self._report(await self.measure(benchmark))
            except MapReduceError as error:
                _log.warning("no benchmark", extra={"error": str(error), "retry_s": retry_s})
            except Exception:  # the top of this task: one bad benchmark must not end a bot
                _log.exception("benchmark failed")
            else:
                continue
            finally:
                self._measuring = False
            self._validator = None  # it may have moved
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(2 * retry_s, RETRY_S[1])

    async def _next(self) -> Benchmark | None:
        if self._validator is None:
            self._validator = await self._find_validator()
            _log.info(
                "bot is ready",
                extra={
                    "hotkey": self._key.ss58_address,
                    "validator": str(self._validator),
                    "version": __version__,
                },
            )
        answer = await call(
            self._http,
            self._key,
            self._validator,
            "POST",
            "/v1/benchmarks/next",
            NextBenchmark(wait_s=WAIT_S),
            BenchmarkAnswer,
            timeout_s=WAIT_S + ANSWER_S,
        )
        return answer.benchmark

    async def _report(self, report: BenchmarkReport) -> None:
        """Raises as `call` does when the validator does not take the report: it is lost then."""
        assert self._validator is not None
        for attempt in range(REPORT_ATTEMPTS):
            try:
                await call(
                    self._http,
                    self._key,
                    self._validator,
                    "POST",
                    "/v1/benchmarks/report",
                    report,
                    Accepted,
                )
                return
            except Unavailable:
                if attempt == REPORT_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(1.0)

    # One benchmark --------------------------------------------------------------------------------

    async def measure(self, benchmark: Benchmark) -> BenchmarkReport:
        """Takes part in one benchmark to its end, good or bad."""
        assert self._validator is not None
        steps: list[list[SegmentTime]] = []
        granted, error, blames = "", "", []
        try:
            job = await open_job(
                self._key,
                self._validator,
                rank=benchmark.rank,
                peer_count=benchmark.peer_count,
                bandwidth=benchmark.tensor_bytes,
                job=benchmark.job,
                join_timeout_s=benchmark.join_timeout_s,
                proof_directory=self._proof_directory,
                pacer=Pacer(benchmark.bytes_per_s),
            )
        except MapReduceError as failure:
            error, blames = str(failure), blames_of(failure, None)
        else:
            granted = job.grant.job
            try:
                await self._steps(job, benchmark, steps)
            except MapReduceError as failure:
                error, blames = str(failure), blames_of(failure, job)
            finally:
                await job.close()
        _log.log(
            logging.WARNING if error else logging.INFO,
            "benchmark over",
            extra={"job": granted[:8], "steps": len(steps), "error": error},
        )
        return BenchmarkReport(
            job=benchmark.job,
            rank=benchmark.rank,
            granted=granted,
            steps=steps,
            blames=blames,
            error=error[:1024],
        )

    async def _steps(
        self, job: PeerJob, benchmark: Benchmark, steps: list[list[SegmentTime]]
    ) -> None:
        """All-reduces until the ranks have been busy for long enough: all of them decide alike, by
        what they have all acknowledged. Between two steps a bot computes, as a trainer does."""
        leave_at = time.monotonic() + benchmark.longest_s
        count = benchmark.tensor_bytes
        memory = np.zeros(count, dtype=np.uint8).data
        undo = np.zeros(count, dtype=np.uint8).data
        seed = bytes.fromhex(benchmark.seed)
        if benchmark.broadcast:
            await self._broadcast(job, benchmark, memory, SeededTensor(seed, 0, benchmark.steps))
        busy_us = 0.0
        for number in range(benchmark.steps):
            inputs = [SeededTensor(seed, rank, number) for rank in range(benchmark.peer_count)]
            await asyncio.to_thread(inputs[benchmark.rank].fill, memory)
            step = await self._collective(
                job, benchmark, ReduceOp.AVG, memory, Target(memory, undo)
            )
            for miner in step.involved:
                await self._recompute(job, step, miner, memory, inputs)
            steps.append(times_of(step, job))
            await asyncio.sleep(benchmark.pause_s - (time.perf_counter() - step.ended_at))
            busy_us += max(max(said) for said in step.acks.values())
            if busy_us >= benchmark.seconds * 1e6 or time.monotonic() > leave_at:
                return

    async def _broadcast(
        self, job: PeerJob, benchmark: Benchmark, memory: memoryview, sent: SeededTensor
    ) -> None:
        """The first rank's tensor goes to all. It is not timed: one rank uploads for all."""
        if benchmark.rank == 0:
            await asyncio.to_thread(sent.fill, memory)
            await self._collective(job, benchmark, ReduceOp.BROADCAST, memory, None)
            return
        target = Target(memory)
        step = await self._collective(job, benchmark, ReduceOp.BROADCAST, None, target)
        if await asyncio.to_thread(first_difference, memory, 0, [sent], step.op) is not None:
            # The certificates say that this is what the first rank has sent.
            raise Refused("the broadcast is not the tensor it should be", code="bad_input")

    @staticmethod
    async def _collective(
        job: PeerJob,
        benchmark: Benchmark,
        op: ReduceOp,
        source: memoryview | None,
        target: Target | None,
    ) -> Step:
        known = TensorSpec(dtype=DType.FLOAT32, shape=(benchmark.tensor_bytes // 4,))
        return await job.collective(
            op,
            tensor=None if source is None else known,
            source=source,
            allocate=None if target is None else lambda _: target,
            enter_timeout_s=benchmark.step_timeout_s,
            timeout_s=benchmark.step_timeout_s,
        )

    @staticmethod
    async def _recompute(
        job: PeerJob, step: Step, miner: int, memory: memoryview, inputs: list[SeededTensor]
    ) -> None:
        """Raises MinerFraud if this miner's segment of the result is not what it must be."""
        segment = step.segments[miner]
        result = memory[segment.offset : segment.offset + segment.length]
        wrong = await asyncio.to_thread(first_difference, result, segment.offset, inputs, step.op)
        if wrong is None:
            return
        claim = await asyncio.to_thread(prove_wrong_sum, step, miner, wrong, result, inputs)
        what = f"byte {wrong} of its segment is not what the ranks' tensors give"
        try:
            check_claim(claim, job.session.signatory.keys)
        except ProofInvalid as error:
            # Then another rank has sent something else, and no sum can be what it must be.
            raise Refused(f"{what}, but that proves nothing: {error}", code="bad_input") from None
        name = job.grant.miners[miner]
        fraud = MinerFraud(
            name.uid,
            name.hotkey,
            what,
            step=step.number,
            segment=miner,
            proof=encode_claim(claim),
        )
        raise await job.audit.accuse(fraud)


def times_of(step: Step, job: PeerJob) -> list[SegmentTime]:
    """What a committed step took at this bot."""

    def since_entry_us(moment: float) -> int:
        return max(0, int((moment - step.began_at) * 1e6))

    return [
        SegmentTime(
            uid=job.grant.miners[miner].uid,
            nbytes=step.segments[miner].length,
            first_us=since_entry_us(step.first_at[miner]),
            last_us=since_entry_us(step.last_at[miner]),
        )
        for miner in step.involved
        if step.segments[miner].length
    ]


def blames_of(error: MapReduceError, job: PeerJob | None) -> list[Blame]:
    """The miners to blame for an error; nobody where a rank, or this bot itself, may be the
    reason."""
    told = error.what if isinstance(error, IntegrityError) else str(error)
    what = told[:MAX_WHAT]
    if isinstance(error, MinerLost):
        return [Blame(uid=error.uid, kind="lost", what=what)]
    if isinstance(error, MinerFraud):
        return [Blame(uid=error.uid, kind="wrong", what=what)]
    if isinstance(error, ResultDisputed):
        return [Blame(uid=error.uid, kind="disputed", what=what)]
    step = None if job is None else job.session.step
    if job is None or step is None:
        return []
    kind: Literal["lost", "stalled", "aborted"] = "aborted"
    miners: Sequence[int] = () if step.aborted_by is None else (step.aborted_by,)
    if isinstance(error, StepInDoubt):
        kind, miners = "lost", job.session.lost
    elif step.aborted_by is None and isinstance(error, PeerTimeout):
        kind, miners = "stalled", stalled_miners(job, step)
    return [Blame(uid=job.grant.miners[m].uid, kind=kind, what=what) for m in miners]


def stalled_miners(job: PeerJob, step: Step) -> list[int]:
    """The miners (indexes) that owe this rank something though it has sent all that it may: a
    miner's own word for whom it waits is worth nothing here."""
    terms = job.grant.terms
    return [
        miner
        for miner in step.involved
        if not (
            miner in step.trust.certificates and step.received[miner] == step.segments[miner].length
        )
        and not (
            job.takes(miner)
            and step.uploads[miner].sendable(terms.window_bytes, terms.frame_bytes) > 0
        )
    ]


async def run_bot(config: PeerConfig) -> None:
    """Serves a validator as a bot until it is told to stop.

    Raises WalletError or ConfigError if it cannot start.
    """
    wallet = config.wallet
    key = load_wallet(wallet.name, wallet.hotkey, wallet.path).hotkey
    chain = config.chain

    def find() -> Awaitable[Remote]:
        return find_validator(
            chain.network, chain.netuid, config.validator_uid, endpoint=chain.endpoint
        )

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mapreduce-bot-") as proofs:
        async with make_http_session() as http:
            bot = Bot(key, find, http, Path(proofs))
            running = asyncio.create_task(bot.run())
            stopped = asyncio.create_task(stop.wait())
            async with supervised(Worker.from_environment(), [bot], stop.set, None):
                await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
            running.cancel()
            stopped.cancel()
            await asyncio.wait([running])
    _log.info("bot is stopping", extra={"seconds": round(time.monotonic() - started)})
    if not running.cancelled() and (error := running.exception()) is not None:
        raise error
