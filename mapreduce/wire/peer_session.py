"""The peer's side of a job, sans-IO: frames of N miners in, frames for N miners out, one collective
at a time.

Knows how a step goes from OPEN to COMMIT, credit, the result buffer, and what each failure means
for the caller. Does not know sockets, time, torch or the validator. Everything that changes the
state of a job at a peer is in this file.

The result may overwrite the input, whose bytes are kept aside until the step is over: if it fails
they come back, so that whatever happens the caller's tensor is whole. A rank acknowledges to all
miners at once, when it holds the whole result; from then on it may not abort alone, and the commit
of any miner proves that every rank holds the result.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mapreduce.core.partition import (
    BLOCK_BYTES,
    EQUAL_WEIGHT,
    map_digest,
    partition,
)
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import (
    BadFrame,
    IntegrityError,
    JobClosed,
    MapReduceError,
    MinerLost,
    StepInDoubt,
)
from mapreduce.wire.aborts import abort_of, error_of
from mapreduce.wire.bodies import Abort, Open, Progress, TensorSpec, decode_text
from mapreduce.wire.frames import REPLY, FrameReader, Header, Kind, encode_frame
from mapreduce.wire.peer_step import Phase, Step, Target
from mapreduce.wire.peer_trust import Signatory, StepTrust
from mapreduce.wire.samples import take_sample
from mapreduce.wire.schedule import FIRST_FRAME_BYTES, next_upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.terms import Terms

_SCRATCH_BYTES = 256 * 1024


class PeerSession:
    """One job at one peer, `signatory`; `clock` gives seconds from any start. Blocks worth a share
    `audit_budget` of a segment's traffic go to the `sample` of a step, for audits; none if it is
    0. `fraud` is what was proven when the step could no longer fail: no further one begins.

    Feed it with `begin`, `miner_lost` and the frames of each miner (through `reader(miner)`); then
    write what `next_upload` gives, and what `take_control` gives for every miner in `ready`, and
    tell `flushed` when a miner's transport holds nothing any more. `step.phase` says when the
    collective is over. Raises BadFrame, with the miner's name, on a protocol violation by that
    miner; the caller then closes the stream and calls `miner_lost`.
    """

    def __init__(
        self,
        terms: Terms,
        signatory: Signatory,
        clock: Callable[[], float],
        audit_budget: float = 0.0,
    ) -> None:
        assert len(signatory.keys.miners) == terms.miner_count
        self.terms = terms
        self.signatory = signatory
        self.rank = signatory.rank
        self.audit_budget = audit_budget
        self.ready: set[int] = set()
        self.weights = (EQUAL_WEIGHT,) * terms.miner_count
        self.frame_bytes = min(FIRST_FRAME_BYTES, terms.frame_bytes)
        self.step: Step | None = None
        self.fraud: IntegrityError | None = None
        self._clock = clock
        self._number = 0
        self._control: list[list[bytes]] = [[] for _ in range(terms.miner_count)]
        self._lost: dict[int, str] = {}
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._allocate: Callable[[int], Target] | None = None

    # Steps ----------------------------------------------------------------------------------------

    def begin(
        self,
        op: ReduceOp,
        *,
        root: int = 0,
        tensor: TensorSpec | None,
        source: memoryview | None,
        allocate: Callable[[int], Target] | None,
    ) -> Step:
        """Enters the next collective.

        Args:
            op: what to do; BROADCAST sends from `root`, the index of a rank.
            tensor: dtype and shape; None for a rank that receives a broadcast and does not know
                them.
            source: the contiguous bytes to contribute, None for a rank that only receives.
            allocate: called with the number of bytes for where the result goes, before any result
                may arrive; it may be the memory of `source`. None at the root of a broadcast.

        Raises:
            MinerLost: the job has lost a miner before.
            IntegrityError: a party of the job is known to have lied in an earlier step.
        """
        assert self.step is None or self.step.done
        if self.fraud is not None:
            raise self.fraud
        for miner, reason in self._lost.items():
            raise self._miner_lost_error(miner, reason)
        self._number += 1
        trust = StepTrust(self.signatory, self._number, self.terms.miner_count)
        step = Step(self._number, op, root, trust)
        step.source = source
        step.began_at = self._clock()
        self.step = step
        self._allocate = allocate
        opened = Open(op=op, root=root, tensor=tensor)
        if tensor is not None:
            self._plan(step, tensor)
            opened = replace(opened, map_digest=map_digest(step.segments))
        first = step.number % self.terms.miner_count
        step.involved = tuple(
            miner
            for miner in range(self.terms.miner_count)
            if op is ReduceOp.BROADCAST or miner == first or step.segments[miner].length
        )
        for miner in step.involved:
            if tensor is not None:
                opened = replace(opened, segment_bytes=step.segments[miner].length)
            opened = replace(opened, nonce_hash=trust.nonce_hash(miner))
            self._send(miner, Kind.OPEN, trust.open_body(miner, opened))
            if source is not None:
                step.uploads[miner].length = step.segments[miner].length
                self._close_if_sent(step, miner)
        return step

    def _plan(self, step: Step, tensor: TensorSpec) -> None:
        """Fixes the cut of the step and, unless this rank is the root, where the result goes."""
        count = self.terms.miner_count
        step.tensor = tensor
        first = step.number % count
        step.segments = partition(tensor.nbytes, count, first=first, weights=self.weights)
        if step.op is not ReduceOp.BROADCAST or step.root != self.rank:
            assert self._allocate is not None
            step.target = self._allocate(tensor.nbytes)

    def abort(self, code: str, message: str, error: MapReduceError) -> bool:
        """Gives the step up with `error`. False if this rank has acknowledged and is bound to
        wait."""
        step = self.step
        if step is None or step.phase is not Phase.RUNNING:
            return False
        self._fail(step, error, Abort(code=code, message=message, rank=self.rank))
        return True

    def forsake(self, error: MapReduceError) -> None:
        """Ends a step that this rank is bound to, because nobody waits for it any more. Its tensor
        is as it was, other ranks may hold the result: the caller must leave the job."""
        if self.step is not None and not self.step.done:
            self.step.fail(error)

    def resolve(self, committed: bool | None) -> None:
        """Ends a step that is in doubt: committed or not, None if nobody knows."""
        step = self.step
        if step is None or step.phase is not Phase.IN_DOUBT:
            return
        if committed:
            step.phase = Phase.COMMITTED
            return
        miner, reason = next(iter(self._lost.items()))
        lost: MapReduceError = self._miner_lost_error(miner, reason)
        if committed is None:
            lost = StepInDoubt(
                f"step {step.number}: {lost}; every rank had acknowledged, and nobody reachable "
                "knows whether the step was committed: other ranks may hold its result, this "
                "tensor is untouched"
            )
        step.fail(lost)

    def miner_lost(self, miner: int, reason: str) -> None:
        """The stream to this miner is gone, for the rest of the job. Idempotent."""
        if miner in self._lost:
            return
        self._lost[miner] = reason
        self._control[miner] = []
        self.ready.discard(miner)
        step = self.step
        if step is None or step.done or miner not in step.involved:
            return
        if step.phase is Phase.RUNNING:
            error = self._miner_lost_error(miner, reason)
            self._fail(step, error, Abort(code="miner_lost", message=reason, miner=miner))
        else:
            self._settle(step)

    @property
    def lost(self) -> tuple[int, ...]:
        """The miners (indexes) whose streams are gone."""
        return tuple(self._lost)

    def ping(self, miner: int) -> None:
        """Asks a miner for a sign of life, and whom it waits for."""
        self._send(miner, Kind.PING, b"")

    # Output ---------------------------------------------------------------------------------------

    def take_control(self, miner: int) -> list[bytes]:
        """The control frames that wait for a miner's socket."""
        frames, self._control[miner] = self._control[miner], []
        self.ready.discard(miner)
        return frames

    def flushed(self, miner: int) -> None:
        """The miner's transport holds no byte of ours any more: the input may be overwritten."""
        if self.step is not None:
            upload = self.step.uploads[miner]
            upload.flushed = upload.sent

    def next_upload(
        self, writable: Callable[[int], bool], *, patient: bool
    ) -> tuple[int, list[bytes | memoryview]] | None:
        """The next DATA frame as (miner, pieces to write in one go); None if it is nobody's turn.
        See `schedule`.

        Control frames that wait for this miner go before it, and CLOSE right behind the last.
        """
        step = self.step
        if step is None or step.phase is not Phase.RUNNING or step.source is None:
            return None
        chosen = next_upload(
            step.uploads,
            rank=self.rank,
            window_bytes=self.terms.window_bytes,
            frame_bytes=step.frame_bytes(self.frame_bytes, self.terms.frame_bytes),
            writable=writable,
            patient=patient,
        )
        if chosen is None:
            return None
        miner, nbytes = chosen
        upload = step.uploads[miner]
        begin = step.segments[miner].offset + upload.sent
        header = Header(
            kind=Kind.DATA,
            step=step.number,
            segment=miner,
            rank=self.rank,
            offset=upload.sent,
            length=nbytes,
        )
        before = self.take_control(miner)
        upload.sent += nbytes
        payload = step.source[begin : begin + nbytes]
        step.trust.sent[miner].add(payload)  # before a RESULT may overwrite it
        self._close_if_sent(step, miner)
        return miner, [*before, header.encode(), payload, *self.take_control(miner)]

    def _close_if_sent(self, step: Step, miner: int) -> None:
        upload = step.uploads[miner]
        if upload.sent == upload.length:
            self._send(miner, Kind.CLOSE, step.trust.close_body(miner))

    def _send(self, miner: int, kind: Kind, body: bytes) -> None:
        if miner in self._lost:
            return
        header = Header(
            kind=kind,
            step=0 if self.step is None else self.step.number,
            segment=miner,
            rank=self.rank,
            length=len(body),
        )
        self._control[miner].append(encode_frame(header, body))
        self.ready.add(miner)

    # Input ----------------------------------------------------------------------------------------

    def reader(self, miner: int) -> FrameReader:
        """What cuts the bytes of this miner's stream into frames for the session."""
        return FrameReader(partial(self.payload_buffer, miner), partial(self.frame_received, miner))

    def payload_buffer(self, miner: int, header: Header, received: int) -> memoryview:
        """See `FrameReader`: the result buffer, or scratch for results of a step that is over."""
        if header.kind is not Kind.RESULT:
            raise self._bad(miner, f"a miner may not send {header.kind.name}")
        if header.length > self.terms.frame_bytes:
            limit = self.terms.frame_bytes
            raise self._bad(miner, f"RESULT of {header.length} bytes: {limit} are granted")
        step = self._live_step(miner, header)
        missing = header.length - received
        if step is None:
            return self._scratch[:missing]
        if step.target is None:
            raise self._bad(miner, "RESULT before the step it belongs to is known")
        if received == 0:
            self._check_result(step, miner, header)
        return step.place(miner, header.offset, header.offset + header.length)[received:]

    def _check_result(self, step: Step, miner: int, header: Header) -> None:
        """Raises BadFrame unless this RESULT continues the segment, by bytes that have been sent:
        it may go where they still are."""
        length, end = step.segments[miner].length, header.offset + header.length
        most = length if step.source is None else step.uploads[miner].flushed
        ragged = header.length % BLOCK_BYTES and end != length
        if header.offset != step.received[miner] or end > min(length, most) or ragged:
            raise self._bad(
                miner,
                f"RESULT of {header.length} bytes at {header.offset}: {step.received[miner]} of "
                f"{length} bytes have come, {step.uploads[miner].flushed} were sent",
            )

    def frame_received(self, miner: int, header: Header, body: memoryview) -> None:
        """A whole frame of this miner has arrived."""
        try:
            self._dispatch(miner, header, body)
        except BadFrame as error:
            if error.who is None:
                raise self._bad(miner, str(error)) from None
            raise
        except IntegrityError as error:
            assert self.step is not None
            if self.step.phase is Phase.RUNNING:
                self._fail(self.step, error, abort_of(error, self.rank))
            else:
                self.fraud = self.fraud or error

    def _dispatch(self, miner: int, header: Header, body: memoryview) -> None:
        if header.kind is Kind.PING:
            self._pinged(miner, header, body)
            return
        if header.kind is Kind.GOODBYE:
            self.miner_lost(miner, f"it said goodbye: {decode_text('GOODBYE', body)}")
            return
        step = self._live_step(miner, header)
        if step is None:
            return
        match header.kind:
            case Kind.RESULT:
                step.take_result(miner, header.length)
                step.uploads[miner].released = step.received[miner]
                step.time_segment(miner, self._clock())
                self._acknowledge_if_complete(step)
            case Kind.OPEN:
                self._announced(step, miner, step.trust.opened(miner, step.root, body))
            case Kind.CREDIT:
                upload = step.uploads[miner]
                if not upload.released <= header.offset <= upload.sent:
                    raise BadFrame(f"CREDIT for {header.offset} of {upload.sent} bytes sent")
                upload.released = header.offset
                step.time_segment(miner, self._clock())
            case Kind.RECEIPT:
                step.trust.receipt(miner, body)
            case Kind.REJECT if step.phase is Phase.RUNNING:
                step.trust.reject(miner, body)
            case Kind.CERTIFICATE:
                step.trust.certificate(miner, body, step)
                step.last_at[miner] = self._clock()
                self._acknowledge_if_complete(step)
            case Kind.COMMIT:
                if step.phase is Phase.RUNNING or miner in step.committed:
                    raise BadFrame("COMMIT without this rank's acknowledgement")
                step.acks[miner] = step.trust.commit(miner, body)
                step.committed.add(miner)
                self._settle(step)
            case Kind.ABORT:
                abort = Abort.decode(body)
                if step.phase is Phase.RUNNING:
                    step.aborted_by = miner
                    self._fail(step, self._error_of(step, abort), abort)
                else:
                    step.aborted[miner] = abort
                    self._settle(step)
            case _:
                raise BadFrame(f"a miner may not send {header.kind.name} here")

    def _live_step(self, miner: int, header: Header) -> Step | None:
        step = self.step
        if header.step > self._number or header.segment != miner or header.epoch != 0:
            raise self._bad(
                miner, f"{header.kind.name} for step {header.step}, segment {header.segment}"
            )
        if step is None or step.done or step.number != header.step:
            return None
        if miner not in step.involved:
            raise self._bad(miner, f"{header.kind.name} in a step it has no part in")
        return step

    def _announced(self, step: Step, miner: int, opened: Open) -> None:
        """A broadcast's root has opened: every miner must tell of the same tensor."""
        tensor = opened.tensor
        if step.op is not ReduceOp.BROADCAST or step.root == self.rank or tensor is None:
            raise BadFrame("OPEN of a step that needs none")
        if step.tensor is None:
            if tensor.nbytes > self.terms.bandwidth:
                raise BadFrame(f"OPEN of {tensor.nbytes} bytes: {self.terms.bandwidth} are granted")
            self._plan(step, tensor)
        if tensor != step.tensor:
            raise BadFrame(f"OPEN tells of {tensor}, another miner of {step.tensor}")
        if (opened.map_digest, opened.segment_bytes) != (
            map_digest(step.segments),
            step.segments[miner].length,
        ):
            raise BadFrame("OPEN cuts the tensor into other segments than this rank does")

    def _pinged(self, miner: int, header: Header, body: memoryview) -> None:
        if not header.flags & REPLY:
            raise BadFrame("a miner only answers PING")
        step = self.step
        if step is not None and header.step == step.number:
            progress = Progress.decode(body)
            if any(rank >= self.terms.peer_count for rank in progress.waiting_for):
                raise BadFrame("PING names ranks that the job does not have")
            step.progress[miner] = progress

    # Outcome --------------------------------------------------------------------------------------

    def _acknowledge_if_complete(self, step: Step) -> None:
        if step.phase is not Phase.RUNNING or not step.complete:
            return
        if step.target is not None:
            for miner in step.involved:
                step.trust.check_output(miner)
        step.phase = Phase.ACKNOWLEDGED
        for miner in step.involved:
            self._send(miner, Kind.ACK, step.trust.ack_body(miner, step.segment_us[miner]))
        self._settle(step)

    def _settle(self, step: Step) -> None:
        """Decides an acknowledged step, once every miner has spoken or is gone."""
        if step.phase is not Phase.ACKNOWLEDGED:
            return
        spoken = step.committed | step.aborted.keys() | self._lost.keys()
        if not spoken.issuperset(step.involved):
            return
        if step.trust.conflict is not None:
            step.fail(step.trust.conflict)
        elif step.committed:
            step.phase = Phase.COMMITTED
            step.ended_at = self._clock()
            self.weights = step.next_weights(self.weights)
            step.sample = take_sample(step, self.audit_budget)
        elif any(miner in self._lost for miner in step.involved):
            step.phase = Phase.IN_DOUBT
        else:
            step.fail(self._error_of(step, next(iter(step.aborted.values()))))

    def _fail(self, step: Step, error: MapReduceError, abort: Abort) -> None:
        """Ends a running step here and tells every miner, which tells every rank."""
        step.fail(error)
        body = abort.encode()
        for miner in step.involved:
            self._send(miner, Kind.ABORT, body)

    def _error_of(self, step: Step, abort: Abort) -> MapReduceError:
        return error_of(abort, step.number, self.signatory.keys)

    def _miner_lost_error(self, miner: int, reason: str) -> MinerLost:
        name = self.signatory.keys.miners[miner]
        return MinerLost(name.uid, name.hotkey, miner, reason)

    def _bad(self, miner: int, message: str) -> BadFrame:
        return BadFrame(message, who=str(self.signatory.keys.miners[miner]))

    def check_open(self) -> None:
        """Raises JobClosed while a collective is under way: they go one at a time."""
        if self.step is not None and not self.step.done:
            raise JobClosed(f"step {self.step.number} is still under way on this peer")
