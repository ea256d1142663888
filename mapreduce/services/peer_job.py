"""One job at a peer: its streams and the collectives over them. Training peers and bots alike.

Knows time and sockets, and what to do when something does not move. Does not know torch or threads,
nor how a job is joined (`joining.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapreduce.errors import (
    BadMessage,
    CertificateConflict,
    IntegrityError,
    JobClosed,
    MapReduceError,
    MinerLost,
    PeerLost,
    PeerTimeout,
    Refused,
    StepInDoubt,
    Unavailable,
    VersionMismatch,
)
from mapreduce.net.auth import sign_request, signer
from mapreduce.net.client import Remote, call
from mapreduce.net.send_queue import MEASURE_S
from mapreduce.net.stream import FrameStream, connect_stream
from mapreduce.services.grants import job_keys, read_grant
from mapreduce.services.peer_audit import PeerAudit
from mapreduce.services.step_report import StepReport, measure
from mapreduce.wire.messages import Accepted, Grant, Report, ReportAnswer, SignedGrant
from mapreduce.wire.peer_session import PeerSession
from mapreduce.wire.peer_step import Phase, Step, Target
from mapreduce.wire.peer_trust import Signatory
from mapreduce.wire.schedule import frame_bytes_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp
    from bittensor.sp_core import Keypair

    from mapreduce.core.reduce import ReduceOp
    from mapreduce.net.pacing import Pacer
    from mapreduce.wire.bodies import TensorSpec

PING_IDLE_S = 15.0  # keeps NAT entries alive between steps
PING_STEP_S = 2.0  # inside a step, to learn whom it waits for
SILENCE_S = 60.0  # four missed PINGs
PATIENCE_S = 0.001  # how long a turn waits for the next miner's socket
LOG_WAIT_S = 10.0  # between two log lines about the same wait
MIN_STALL_S = 20.0  # inside a step: nothing moves for that long, or for ten times the last step
CONNECT_TIMEOUT_S = 10.0
DOUBT_TIMEOUT_S = 5.0  # for other ranks to tell the validator what they saw
LEARN_S = 1.0  # for the validator to tell whether a rank was lost because of a lie
PROOF_DIRECTORY = Path("~/.mapreduce/proofs")
LAST_REPORT_S = 2.0  # for a report that is on its way when the job is closed

_log = logging.getLogger(__name__)


class PeerJob:
    """A granted job whose streams are open. Use it from one event loop; make it with `open_job`."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        validator: Remote,
        session_key: Keypair,
        signed: SignedGrant,
        grant: Grant,
        rank: int,
        *,
        audit: bool = True,
        proof_directory: Path = PROOF_DIRECTORY,
        pacer: Pacer | None = None,
    ) -> None:
        self.grant = grant
        self.rank = rank
        self.miners = [
            Remote(f"miner uid {miner.uid}", miner.hotkey, miner.ip, miner.port)
            for miner in grant.miners
        ]
        signatory = Signatory(job_keys(signed, grant), rank, signer(session_key), os.urandom)
        budget = grant.audit_budget if audit else 0.0
        # Not the loop's clock: uvloop's counts whole milliseconds.
        self.session = PeerSession(grant.terms, signatory, time.perf_counter, budget)
        self.audit = PeerAudit(
            http, validator, session_key, signed, grant.job, signatory, proof_directory
        )
        self.last_step: StepReport | None = None
        self._http = http
        self._validator = validator
        self._key = session_key
        self._signed = signed
        self._streams: dict[int, FrameStream] = {}
        self._responses: list[aiohttp.ClientResponse] = []
        self._changed = asyncio.Event()
        self._patience: asyncio.TimerHandle | None = None
        self._upkeep: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._committed_step = 0
        self._loss_report: asyncio.Task[object] | None = None
        self._closing = False
        self._heard_of_fraud = False
        self._pump_due = False
        self._pacer = pacer
        self._measuring: asyncio.TimerHandle

    # Opening and closing ------------------------------------------------------------------------

    async def connect(self) -> None:
        """Opens one stream to every miner. Raises MinerLost or VersionMismatch, naming the
        miner."""
        async with asyncio.TaskGroup() as group:
            for index in range(len(self.miners)):
                group.create_task(self._connect(index))
        self._upkeep = asyncio.create_task(self._keep_up())
        self.audit.start()

    async def _connect(self, index: int) -> None:
        remote = self.miners[index]
        path = f"/v1/jobs/{self.grant.job}/stream"
        headers = sign_request(self._key, method="GET", path=path, body=b"", receiver=remote.hotkey)
        stream = FrameStream(self, self.session.reader(index), index)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                response = await connect_stream(self._http, remote, path, headers, stream)
        except TimeoutError:
            reason = f"{remote} did not open a stream in {CONNECT_TIMEOUT_S:g} s"
            raise self._lost(index, reason) from None
        except VersionMismatch:
            raise
        except (Unavailable, Refused) as error:
            raise self._lost(index, str(error)) from None
        self._responses.append(response)
        self._streams[index] = stream

    def _lost(self, index: int, reason: str) -> MinerLost:
        miner = self.grant.miners[index]
        return MinerLost(miner.uid, miner.hotkey, index, reason)

    async def close(self, reason: str = "the peer is done") -> None:
        """Leaves the job; every socket is closed when it returns.

        A step under way fails everywhere.
        """
        self._closing = True
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        self.abort(reason)  # who waits for a step in another thread must not wait for ever
        if self._loss_report is not None:
            # Other ranks may be in doubt, and this one knows the outcome.
            await asyncio.wait([self._loss_report], timeout=LAST_REPORT_S)
            self._loss_report.cancel()
        streams = tuple(self._streams.values())
        self._leave(reason)
        if self._patience is not None:
            self._patience.cancel()
        if streams:
            await asyncio.wait([stream.closed for stream in streams], timeout=5.0)
        for response in self._responses:
            response.close()
        try:
            await self.audit.close()
        finally:
            await self._http.close()

    def _leave(self, reason: str) -> None:
        """Tells every miner, which tells every rank, that this peer takes part in no more steps."""
        for stream in tuple(self._streams.values()):
            stream.close(reason)

    # Collectives --------------------------------------------------------------------------------

    async def collective(
        self,
        op: ReduceOp,
        *,
        root: int = 0,
        tensor: TensorSpec | None,
        source: memoryview | None,
        allocate: Callable[[int], Target] | None,
        enter_timeout_s: float,
        timeout_s: float | None = None,
    ) -> Step:
        """Runs one collective to its commit; see `PeerSession.begin` for the arguments.

        `enter_timeout_s` bounds the wait for ranks that have not entered, `timeout_s` the whole
        step. Raises StepFailed or Unavailable; memory is as it was before and nobody has the
        result.
        """
        self.session.check_open()
        started, started_at = self._loop.time(), time.perf_counter()
        self._changed.clear()
        self.session.fraud = self.session.fraud or self.audit.fraud
        try:
            step = self.session.begin(
                op, root=root, tensor=tensor, source=source, allocate=allocate
            )
        except (MinerLost, IntegrityError) as error:
            self._heard_of_fraud = isinstance(error, IntegrityError)
            self._leave(str(error))  # other ranks may not know: without us no step can end
            raise
        self._pump()
        self._measure_queues()
        try:
            await self._wait(step, started, enter_timeout_s, timeout_s)
        finally:
            if not step.done and not self.abort("the caller gave up"):
                given_up = JobClosed(f"step {step.number} was given up, after its acknowledgement")
                self.session.forsake(given_up)
                # It does not learn how the step ended, and so not how the next one is cut.
                self._leave(str(given_up))
            self._rest_queues()
            self.audit.step_over(step)
            step.release()
        if step.phase is Phase.COMMITTED:
            self._committed_step = step.number
        if self.session.lost and not isinstance(step.error, StepInDoubt):
            # Ranks that are in doubt ask the validator.
            await self._report(step, "failed" if step.error else "committed")
        if self.session.fraud is not None:
            self.session.fraud = await self.audit.accuse(self.session.fraud)
        if step.error is not None:
            raise await self._explained(step.error)
        self.last_step = measure(step, self.grant.miners, time.perf_counter() - started_at)
        return step

    @property
    def unheard_fraud(self) -> IntegrityError | None:
        """A lie that the validator has proven and that no collective has raised."""
        known = self.audit.fraud or self.session.fraud
        return None if self._heard_of_fraud else known

    async def _explained(self, error: MapReduceError) -> MapReduceError:
        """Why the step failed, with the evidence filed; a rank may have left because of a lie."""
        if isinstance(error, CertificateConflict):
            # Other ranks may have committed it, and cut the next step by what it took.
            self._leave(str(error))
            error = self.session.fraud = await self.audit.accuse(error)
        elif isinstance(error, IntegrityError):
            error = await self.audit.accuse(error)
        elif isinstance(error, PeerLost) and not self._closing:
            error = await self.audit.known_fraud(LEARN_S) or error
        self._heard_of_fraud = isinstance(error, IntegrityError) and bool(error.proof)
        return error

    def abort(self, reason: str) -> bool:
        """Gives up the step under way, on every rank.

        False if there is none that may still fail.
        """
        step = self.session.step
        error = JobClosed(f"step {step.number if step else 0} was given up: {reason}")
        aborted = self.session.abort("peer_abort", reason, error)
        self._pump()
        self._changed.set()
        return aborted

    async def _wait(
        self, step: Step, started: float, enter_timeout_s: float, timeout_s: float | None
    ) -> None:
        """Returns when the step is over; gives it up when a deadline passes or nothing moves."""
        last = self.last_step
        stall_s = max(MIN_STALL_S, 10 * last.seconds if last else 0.0)
        moved, moved_at = 0, started
        # Soon enough to know, at the deadline, whom the step waits for.
        tick_s = min(0.5, enter_timeout_s / 4, math.inf if timeout_s is None else timeout_s / 4)
        pinged_at = started + tick_s - PING_STEP_S
        logged_at = started
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await self._changed.wait()
            self._changed.clear()
            if step.phase is Phase.IN_DOUBT:
                await self._resolve_doubt(step)
            if step.done:
                return
            now = self._loop.time()
            if not step.entered or step.moved_bytes != moved:
                moved, moved_at = step.moved_bytes, now
            if now - pinged_at > PING_STEP_S:
                pinged_at = now
                self._ping(step.involved)
            if now - logged_at > LOG_WAIT_S:
                logged_at = now
                _log.info("waiting", extra=self._describe_wait(step, now - started))
            self._check_deadlines(
                step, now - started, now - moved_at, stall_s, enter_timeout_s, timeout_s
            )

    def _check_deadlines(
        self,
        step: Step,
        waited_s: float,
        still_s: float,
        stall_s: float,
        enter_timeout_s: float,
        timeout_s: float | None,
    ) -> None:
        waiting_for = [rank + 1 for rank in step.waiting_for]
        what = f"step {step.number} ({step.op.label})"
        if timeout_s is not None and waited_s > timeout_s:
            error = PeerTimeout(waiting_for, timeout_s, f"{what} did not end")
        elif not step.entered and waited_s > enter_timeout_s:
            error = PeerTimeout(waiting_for, enter_timeout_s, f"not all ranks entered {what}")
        elif step.entered and still_s > stall_s:
            error = PeerTimeout(waiting_for, stall_s, f"nothing moved in {what}")
        else:
            return
        if self.session.abort("peer_timeout", str(error), error):
            self._pump()
        elif step.phase is Phase.ACKNOWLEDGED and still_s > stall_s:
            # Bound by the acknowledgement: who does not say how the step ended counts as lost.
            for miner in set(step.involved) - step.committed - step.aborted.keys():
                if miner in self._streams:
                    self._streams[miner].fail(f"no COMMIT in {stall_s:g} s")

    def _describe_wait(self, step: Step, seconds: float) -> dict[str, object]:
        return {
            "step": step.number,
            "op": step.op.label,
            "seconds": round(seconds, 1),
            "entered": step.entered,
            "waiting_for_ranks": [rank + 1 for rank in step.waiting_for],
        }

    def _measure_queues(self) -> None:
        """While a step is under way: lets send buffers and frames follow what the links carry."""
        now = time.perf_counter()
        rate = 0.0
        for stream in self._streams.values():
            if stream.queue is not None:
                stream.queue.measure(now)
                rate += stream.queue.bytes_per_s
        if rate > 0:
            self.session.frame_bytes = frame_bytes_for(rate, self.grant.frame_bytes)
        self._measuring = self._loop.call_later(MEASURE_S, self._measure_queues)

    def _rest_queues(self) -> None:
        self._measuring.cancel()
        for stream in self._streams.values():
            if stream.queue is not None:
                stream.queue.rest()

    # Streams ------------------------------------------------------------------------------------

    def stream_received(self, stream: FrameStream) -> None:
        self._wake()
        if not self._pump_due:  # once for all frames that the loop finds in one go
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def stream_writable(self, stream: FrameStream) -> None:
        self.session.flushed(stream.index)
        self._pump()

    def stream_lost(self, stream: FrameStream, reason: str) -> None:
        self._streams.pop(stream.index, None)
        self.session.miner_lost(stream.index, reason)
        self._pump()
        self._wake()
        step = self.session.step
        first = self._loss_report is None and not self._closing
        if first and step is not None and step.phase is Phase.COMMITTED:
            # This miner may not have told every rank: those in doubt ask the validator.
            self._loss_report = asyncio.create_task(self._report(step, "committed"))

    def _wake(self) -> None:
        step = self.session.step
        if step is not None and (step.done or step.phase is Phase.IN_DOUBT):
            self._changed.set()

    def takes(self, miner: int) -> bool:
        """Whether this miner's socket takes more bytes now."""
        stream = self._streams.get(miner)
        return stream is not None and stream.writable

    def _pump(self, patient: bool = True) -> None:
        """Writes what the session has: control at once, data as the schedule says."""
        self._pump_due = False
        session, pacer = self.session, self._pacer
        sent, pause_s = False, 0.0
        while True:
            if pacer is not None and (pause_s := pacer.wait_s(self._loop.time())) > 0:
                break
            upload = session.next_upload(self.takes, patient=patient)
            if upload is None:
                break
            miner, pieces = upload
            stream = self._streams[miner]
            stream.write(*pieces)
            if pacer is not None:
                pacer.spend(sum(map(len, pieces)))
            if stream.writable:
                session.flushed(miner)
            sent = True
        for miner in tuple(session.ready):
            if self.takes(miner):
                self._streams[miner].write(*session.take_control(miner))
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        step = session.step
        if step is None or not step.uploading:
            return
        if pause_s > 0:
            self._patience = self._loop.call_later(pause_s, self._pump)
        elif not sent and patient:
            self._patience = self._loop.call_later(PATIENCE_S, self._pump, False)

    def _ping(self, miners: tuple[int, ...]) -> None:
        for miner in miners:
            self.session.ping(miner)
        self._pump()

    # Upkeep -------------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        """Between and during steps: keeps paths open, notices dead ones, renews the grant."""
        renew_at = self._renewal_time()
        while True:
            await asyncio.sleep(PING_IDLE_S)
            now = self._loop.time()
            for stream in tuple(self._streams.values()):
                if now - stream.last_read > SILENCE_S:
                    stream.fail(f"no sign of life for {SILENCE_S:g} s")
            self._ping(tuple(self._streams))
            if time.time() > renew_at:
                try:
                    await self._renew()
                    renew_at = self._renewal_time()
                except MapReduceError as error:
                    left_s = round(self.grant.expires_at - time.time())
                    _log.warning(
                        "grant not renewed", extra={"error": str(error), "expires_in_s": left_s}
                    )

    def _renewal_time(self) -> float:
        """Half of what is left from now: a renewed grant keeps the time at which it was created."""
        return (time.time() + self.grant.expires_at) / 2

    async def _renew(self) -> None:
        signed = await call(
            self._http, self._key, self._validator, "POST", "/v1/renew", self._signed, SignedGrant
        )
        grant = read_grant(signed, self._validator.hotkey)
        if grant.job != self.grant.job:
            raise BadMessage("the renewed grant is another job's", who=str(self._validator))
        path = f"/v1/jobs/{grant.job}/grant"
        for miner in self.miners:
            await call(self._http, self._key, miner, "POST", path, signed, Accepted)
        self._signed, self.grant = signed, grant

    # Doubt --------------------------------------------------------------------------------------

    async def _resolve_doubt(self, step: Step) -> None:
        """Asks the validator for a while what other ranks saw: they report once they know."""
        deadline = self._loop.time() + DOUBT_TIMEOUT_S
        committed: bool | None = None
        while committed is None and self._loop.time() < deadline and not self._closing:
            answer = await self._report(step, "in_doubt")
            if answer is not None and answer.committed_step >= step.number:
                committed = True
            elif answer is not None and step.number in answer.failed_steps:
                committed = False
            else:
                await asyncio.sleep(0.5)
        self.session.resolve(committed)

    async def _report(self, step: Step, outcome: Any) -> ReportAnswer | None:  # Any: a Literal
        committed = step.number if step.phase is Phase.COMMITTED else self._committed_step
        report = Report(
            grant=self._signed,
            rank=self.rank,
            step=step.number,
            committed_step=committed,
            outcome=outcome,
            lost_miners=[self.grant.miners[miner].uid for miner in self.session.lost],
            message=str(step.error or "")[:1024],
        )
        try:
            return await call(
                self._http, self._key, self._validator, "POST", "/v1/report", report, ReportAnswer
            )
        except MapReduceError as error:
            _log.warning("validator took no report", extra={"error": str(error)})
            return None
