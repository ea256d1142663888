"""The miner's side of a job, sans-IO: frames of K peers in, frames for K peers out.

Knows the order of a step (OPEN, DATA, RESULT, CERTIFICATE, ACK, COMMIT), windows, rings and who has
to be told what. Does not know sockets, time, signatures or tensors' meaning. Everything that
changes the state of a job at a miner is in this file.

A step at one miner: every rank opens it; the K OPENs are compared; the longest prefix that every
contributor has sent is reduced in rank order and goes to all ranks at once; when all is reduced
comes the certificate; when every rank has acknowledged comes the commit. The commit of any one
miner proves that every rank holds the whole result, because a rank acknowledges to all miners
together, after the last one's result.

Ranks need not take part in the same steps at every miner (a small tensor has one segment), so step
numbers here grow but may skip.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp, check_reducible
from mapreduce.errors import BadFrame, UnsupportedTensor
from mapreduce.wire.bodies import Abort, Ack, Open, Progress, decode_text
from mapreduce.wire.frames import HEADER_BYTES, REPLY, FrameReader, Header, Kind, encode_frame
from mapreduce.wire.miner_step import MinerStep
from mapreduce.wire.miner_trust import MinerTrust
from mapreduce.wire.rings import OutputRing, OutputRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.terms import Terms

MAX_REMEMBERED_ABORTS = 128
MAX_WAITING_FRAMES = 1024  # control frames for a rank that does not read them
MAX_WAITING_FOR_PING = 64
_SCRATCH_BYTES = 256 * 1024


class _Stream:
    """What waits for one peer's socket."""

    def __init__(self) -> None:
        self.attached = False
        self.lost: str | None = None
        self.entered = 0  # the last step this rank has opened here
        self.control: deque[bytes] = deque()
        self.results: deque[OutputRun] = deque()
        self.in_hand: OutputRun | None = None


class MinerSession:
    """One job at one miner.

    Feed it with `attach`, `detach` and the frames of each rank (through `reader(rank)`); then call
    `reduce` (once for many frames: longer runs cost less), write what `next_output(rank)` gives for
    every rank in `ready`, and call `output_done(rank)` when the transport no longer needs it.
    Raises BadFrame on a protocol violation by the rank whose frame it is; the caller then closes
    that stream and calls `detach`. `sign` signs with the miner's hotkey.
    """

    def __init__(
        self, terms: Terms, segment: int, keys: JobKeys, sign: Callable[[bytes], bytes]
    ) -> None:
        self.terms = terms
        self.segment = segment
        self.trust = MinerTrust(keys, segment, sign)
        self.ready: set[int] = set()
        self.committed_steps = 0
        self.reduced_bytes = 0
        self._streams = [_Stream() for _ in range(terms.peer_count)]
        self._step: MinerStep | None = None
        self._aborts: dict[int, Abort] = {}
        self._rings: list[memoryview] = []
        self._output = OutputRing(terms.ring_bytes, HEADER_BYTES)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    # Streams --------------------------------------------------------------------------------------

    def attach(self, rank: int) -> None:
        """The stream of `rank` is open. Raises BadFrame if it already was: a rank has one stream
        for life."""
        stream = self._streams[rank]
        if stream.attached or stream.lost is not None:
            raise BadFrame(f"rank {rank + 1} has already had its stream to this miner")
        stream.attached = True

    def detach(self, rank: int, reason: str) -> None:
        """The stream of `rank` is gone: its step fails on the others unless it had acknowledged.
        Idempotent."""
        stream = self._streams[rank]
        if stream.lost is not None:
            return
        stream.attached = False
        stream.lost = reason
        stream.control.clear()
        self._drop_results(stream)
        self.output_done(rank)
        self.ready.discard(rank)
        step = self._step
        if step is not None and rank not in step.acked:
            self._abort(step, self._lost_abort(rank, reason))

    @property
    def attached(self) -> int:
        """How many streams are open."""
        return sum(stream.attached for stream in self._streams)

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    def reader(self, rank: int) -> FrameReader:
        """What cuts the bytes of this rank's stream into frames for the session."""
        return FrameReader(partial(self.payload_buffer, rank), partial(self.frame_received, rank))

    # Output ---------------------------------------------------------------------------------------

    def next_output(self, rank: int) -> list[bytes | memoryview]:
        """The next pieces for this rank's socket, to write in one go: control, and a result behind
        it. Empty if there is nothing to write."""
        stream = self._streams[rank]
        pieces: list[bytes | memoryview] = [*stream.control]
        stream.control.clear()
        if stream.results and stream.in_hand is None:
            stream.in_hand = stream.results.popleft()
            pieces.append(stream.in_hand.frame)
        if not pieces:
            self.ready.discard(rank)
        return pieces

    def output_done(self, rank: int) -> None:
        """The transport holds no piece of this rank's any more: its place in the ring is free
        again."""
        stream = self._streams[rank]
        if stream.in_hand is not None:
            self._output.release(stream.in_hand)
            stream.in_hand = None
            if stream.results:
                self.ready.add(rank)

    def _send(self, rank: int, header: Header, body: bytes = b"") -> None:
        stream = self._streams[rank]
        if stream.attached:
            stream.control.append(encode_frame(header, body))
            self.ready.add(rank)

    def _send_step(self, rank: int, kind: Kind, step: int, body: bytes, offset: int = 0) -> None:
        header = Header(
            kind=kind, step=step, segment=self.segment, rank=rank, offset=offset, length=len(body)
        )
        self._send(rank, header, body)

    def _drop_results(self, stream: _Stream) -> None:
        while stream.results:
            self._output.release(stream.results.popleft())

    # Input ----------------------------------------------------------------------------------------

    def payload_buffer(self, rank: int, header: Header, received: int) -> memoryview:
        """See `FrameReader`: a place in this rank's ring, or scratch for the data of a step that
        has failed."""
        if header.kind is not Kind.DATA:
            raise BadFrame(f"a peer may not send {header.kind.name}")
        if received == 0 and header.length > self.terms.frame_bytes:
            raise BadFrame(
                f"DATA of {header.length} bytes: 1 to {self.terms.frame_bytes} are granted"
            )
        step = self._live_step(rank, header)
        missing = header.length - received
        if step is None:
            return self._scratch[:missing]
        if received == 0:
            step.check_data(rank, header, self.terms.window_bytes)
        if not self._rings:
            self._rings = [
                np.empty(self.terms.window_bytes, dtype=np.uint8).data
                for _ in range(self.terms.peer_count)
            ]
        position = (header.offset + received) % self.terms.window_bytes
        return self._rings[rank][position : position + missing]

    def frame_received(self, rank: int, header: Header, body: memoryview) -> None:
        """A whole frame of this rank has arrived."""
        waiting = len(self._streams[rank].control)
        if waiting > MAX_WAITING_FRAMES:
            raise BadFrame(f"{waiting} frames wait for a rank that sends and does not read")
        match header.kind:
            case Kind.DATA:
                step = self._live_step(rank, header)
                if step is not None:
                    self._take(step, rank, header.length)
            case Kind.OPEN:
                self._opened(rank, header, body)
            case Kind.CLOSE:
                self._closed(rank, header, body)
            case Kind.ACK:
                self._acked(rank, header, Ack.decode(body))
            case Kind.ABORT:
                self._aborted_by(rank, header, Abort.decode(body))
            case Kind.PING:
                if not header.flags & REPLY and waiting < MAX_WAITING_FOR_PING:
                    self._pinged(rank)
            case Kind.GOODBYE:
                self.detach(rank, decode_text("GOODBYE", body) or "it left the job")
            case _:
                raise BadFrame(f"a peer may not send {header.kind.name} here")

    def _live_step(self, rank: int, header: Header) -> MinerStep | None:
        """The step this frame belongs to, None if that step is over; BadFrame if the rank never
        opened it."""
        if header.step > self._streams[rank].entered:
            raise BadFrame(f"{header.kind.name} for step {header.step}, which was not opened")
        self._check_place(rank, header)
        step = self._step
        if step is None or step.number != header.step or step.opens[rank] is None:
            return None
        return step

    def _check_place(self, rank: int, header: Header) -> None:
        kind = header.kind.name
        if header.segment != self.segment or header.epoch != 0:
            raise BadFrame(f"{kind} for segment {header.segment}, this is {self.segment}")
        if header.rank != rank:
            raise BadFrame(f"{kind} of rank {header.rank + 1} on the stream of rank {rank + 1}")

    def _take(self, step: MinerStep, rank: int, nbytes: int) -> None:
        """The next bytes of the rank's segment are in its ring."""
        position = step.received[rank] % self.terms.window_bytes
        run = self._rings[rank][position : position + nbytes]
        step.inputs[rank].add(run)
        if len(run) < nbytes:
            step.inputs[rank].add(self._rings[rank][: nbytes - len(run)])
        step.received[rank] += nbytes

    def _opened(self, rank: int, header: Header, body: memoryview) -> None:
        self._check_place(rank, header)
        opened = self.trust.opened(header.step, rank, body)
        stream, number = self._streams[rank], header.step
        if number <= stream.entered:
            raise BadFrame(f"OPEN of step {number} after step {stream.entered}")
        length = self._segment_length(rank, opened)
        stream.entered = number
        step = self._step
        if step is not None and step.number < number and step.opens[rank] is not None:
            raise BadFrame(f"OPEN of step {number} inside step {step.number}")
        lost = next((r for r, s in enumerate(self._streams) if s.lost is not None), None)
        if number in self._aborts:
            self._send_step(rank, Kind.ABORT, number, self._aborts[number].encode())
        elif lost is not None:
            self._remember_abort(number, self._lost_abort(lost, self._streams[lost].lost or ""))
            self._send_step(rank, Kind.ABORT, number, self._aborts[number].encode())
        elif step is not None and number < step.number:
            abort = self._order_mismatch(rank, number, step)
            self._remember_abort(number, abort)
            self._send_step(rank, Kind.ABORT, number, abort.encode())
        else:
            if step is not None and step.number < number:
                # This rank has left the step without us (it failed elsewhere): it cannot finish
                # here.
                self._abort(step, self._order_mismatch(rank, number, step))
                step = None
            if step is None:
                step = self._step = MinerStep(number, self.terms.peer_count)
            step.opens[rank] = opened
            step.open_bodies[rank] = bytes(body)
            step.lengths[rank] = length
            if len(step.entered()) == self.terms.peer_count:
                self._agree(step)

    def _segment_length(self, rank: int, opened: Open) -> int:
        """Bytes of this miner's segment in the tensor that the rank opened with, 0 if it has
        none."""
        if opened.root >= self.terms.peer_count:
            raise BadFrame(f"OPEN names root {opened.root} of {self.terms.peer_count} peers")
        tensor = opened.tensor
        if tensor is None:
            if opened.op is not ReduceOp.BROADCAST or opened.root == rank:
                raise BadFrame("OPEN of a contributor without dtype and shape")
            return 0
        if tensor.nbytes > self.terms.bandwidth:
            raise BadFrame(f"OPEN of {tensor.nbytes} bytes: {self.terms.bandwidth} are granted")
        if opened.op is not ReduceOp.BROADCAST:
            try:
                check_reducible(opened.op, tensor.dtype)
            except UnsupportedTensor as error:
                raise BadFrame(f"OPEN of a step no miner can reduce: {error}") from None
        length = opened.segment_bytes
        if length > tensor.nbytes or length % tensor.dtype.itemsize:
            raise BadFrame(f"OPEN of a segment of {length} bytes in {tensor.nbytes}")
        return length

    def _agree(self, step: MinerStep) -> None:
        """Every rank is in: compares what they said, and starts reducing or fails the step on all
        of them."""
        differences = step.agree(self.terms.frame_bytes)
        if differences:
            abort = Abort(code="mismatch", message="ranks disagree", differences=differences)
            self._abort(step, abort)
            return
        if step.readers != step.contributors:
            body = step.open_bodies[step.contributors[0]]
            for rank in step.readers:
                self._send_step(rank, Kind.OPEN, step.number, body)

    def _closed(self, rank: int, header: Header, said: memoryview) -> None:
        step = self._live_step(rank, header)
        if step is None:
            return
        opened = step.opens[rank]
        assert opened is not None
        if opened.op is ReduceOp.BROADCAST and opened.root != rank:
            # A receipt for nothing would contradict the certificate, and convict this miner.
            raise BadFrame("CLOSE from a rank that receives this broadcast")
        if step.received[rank] != step.lengths[rank]:
            raise BadFrame(f"CLOSE after {step.received[rank]} of {step.lengths[rank]} bytes")
        signed, root = self.trust.upload(step, rank, said)
        if rank in step.closed:
            proof = self.trust.two_uploads(step.closed[rank], signed)
            what = f"rank {rank + 1} has signed two different uploads"
            self._abort(step, Abort(code="fraud", message=what, rank=rank, proof=proof))
            return
        step.closed[rank] = signed
        if step.inputs[rank].root() == root:
            self._send_step(rank, Kind.RECEIPT, step.number, self.trust.receipt_body(step, rank))
            return
        body, reject = self.trust.reject(step, rank)
        self._send_step(rank, Kind.REJECT, step.number, body)
        what = f"this miner received other bytes than rank {rank + 1} says it sent"
        self._abort(
            step,
            Abort(code="dispute", message=what, rank=rank, miner=self.segment, proof=reject),
        )

    def _acked(self, rank: int, header: Header, ack: Ack) -> None:
        step = self._live_step(rank, header)
        if step is None:
            return
        if not step.certified or rank in step.acked:
            raise BadFrame("ACK of a segment that has no certificate yet")
        self.trust.check_ack(step, rank, ack)
        step.acked[rank] = ack
        if len(step.acked) == self.terms.peer_count:
            self._step = None
            self.committed_steps += 1
            everyone = range(self.terms.peer_count)
            body = self.trust.commit_body(step)
            for reader in everyone:
                self._send_step(reader, Kind.COMMIT, step.number, body)

    def _pinged(self, rank: int) -> None:
        step = self._step
        progress = Progress(phase=Progress.ENTERING, waiting_for=())
        if step is not None:
            behind = tuple(r for r in step.readers if self._streams[r].results)
            progress = step.progress(behind)
        body = progress.encode()
        number = 0 if step is None else step.number
        header = Header(
            kind=Kind.PING, flags=REPLY, step=number, segment=self.segment, length=len(body)
        )
        self._send(rank, header, body)

    # Reducing -------------------------------------------------------------------------------------

    def reduce(self) -> None:
        """Reduces the longest prefix that all contributors have sent, as far as the output ring has
        room; certifies the segment when that was all."""
        step = self._step
        if step is None or step.reducer is None or step.certified:
            return
        window = self.terms.window_bytes
        available = min(step.received[rank] for rank in step.contributors)
        while step.reduced < available:
            position = step.reduced % window
            nbytes = min(available - step.reduced, window - position, self.terms.frame_bytes)
            if step.readers:
                room = self._output.payload_room()
                if room < nbytes:
                    nbytes = room - room % BLOCK_BYTES
                    if nbytes == 0:
                        return
            inputs = [self._rings[rank][position : position + nbytes] for rank in step.contributors]
            self._emit(step, inputs, nbytes)
            step.reduced += nbytes
            self.reduced_bytes += nbytes
            self._credit_root(step)
        if step.reduced == step.length and step.closed.keys() >= set(step.contributors):
            step.certified = True
            body = self.trust.certificate_body(step)
            for rank in range(self.terms.peer_count):
                self._send_step(rank, Kind.CERTIFICATE, step.number, body)

    def _emit(self, step: MinerStep, inputs: list[memoryview], nbytes: int) -> None:
        if not step.readers:
            return
        assert step.reducer is not None
        run, payload = self._output.allocate(nbytes, len(step.readers))
        header = Header(
            kind=Kind.RESULT,
            step=step.number,
            segment=self.segment,
            offset=step.reduced,
            length=nbytes,
        )
        run.frame[:HEADER_BYTES] = header.encode()
        step.reducer.reduce(inputs, payload)
        if step.contributors == step.readers:  # a broadcast comes out as it went in
            step.output.add(payload)
        for rank in step.readers:
            self._streams[rank].results.append(run)
            self.ready.add(rank)

    def _credit_root(self, step: MinerStep) -> None:
        """The root of a broadcast gets no RESULT, so it is told in words what has been released."""
        for rank in step.contributors:
            if rank not in step.readers:
                self._send_step(rank, Kind.CREDIT, step.number, b"", offset=step.reduced)

    # Failing --------------------------------------------------------------------------------------

    def _aborted_by(self, rank: int, header: Header, abort: Abort) -> None:
        step = self._live_step(rank, header)
        if step is None or rank in step.acked:
            return  # over already, or bound by its acknowledgement
        code = abort.code if abort.code in {"peer_timeout", "miner_lost"} else "peer_abort"
        relayed = Abort(code=code, message=abort.message, rank=rank, miner=abort.miner)
        if abort.code == "mismatch":
            # Found by the step's anchor: every other miner passes on what it said.
            relayed = Abort(code="mismatch", message=abort.message, differences=abort.differences)
        elif abort.code == "dispute" and not self.trust.rejected(abort, header.step):
            relayed = replace(abort, rank=rank)  # nobody speaks for another
        elif abort.code in {"peer_lost", "dispute", "fraud"}:
            relayed = abort
        self._abort(step, relayed)

    def _abort(self, step: MinerStep, abort: Abort) -> None:
        """Fails the step on every rank that is in it; those still to come learn it when they open
        it."""
        self._remember_abort(step.number, abort)
        self._step = None
        body = abort.encode()
        for rank in step.entered():
            self._drop_results(self._streams[rank])
            self._send_step(rank, Kind.ABORT, step.number, body)

    def _remember_abort(self, number: int, abort: Abort) -> None:
        self._aborts[number] = abort
        passed = min(stream.entered for stream in self._streams)
        for old in [old for old in self._aborts if old <= passed and old != number]:
            del self._aborts[old]
        while len(self._aborts) > MAX_REMEMBERED_ABORTS:
            del self._aborts[min(self._aborts)]

    def _lost_abort(self, rank: int, reason: str) -> Abort:
        return Abort(code="peer_lost", message=reason, rank=rank)

    def _order_mismatch(self, rank: int, number: int, step: MinerStep) -> Abort:
        said = dict.fromkeys(step.entered(), f"step {step.number}")
        differences = {"step order": said | {rank: f"step {number}"}}
        return Abort(
            code="mismatch", message="ranks are in different steps", differences=differences
        )
