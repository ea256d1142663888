"""One collective as its peer sees it: what was sent, what came, who has spoken. Changed only by the
session."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.core.partition import MIN_SEGMENT_BYTES, rebalance
from mapreduce.wire.bodies import MAX_SEGMENT_US, Abort, Progress, TensorSpec
from mapreduce.wire.schedule import Upload

if TYPE_CHECKING:
    from mapreduce.core.partition import Segment
    from mapreduce.core.reduce import ReduceOp
    from mapreduce.errors import MapReduceError
    from mapreduce.wire.peer_trust import StepTrust
    from mapreduce.wire.samples import Sample


class Phase(enum.Enum):
    """Where a step stands."""

    RUNNING = enum.auto()  # may still be aborted by anyone
    ACKNOWLEDGED = enum.auto()  # holds the whole result; bound until a miner says how it ended
    IN_DOUBT = enum.auto()  # the miners that could say are gone; the validator may know
    COMMITTED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result goes, byte for byte.

    `memory` may be the input itself: a result comes only after the input was sent. What it
    overwrites goes to `undo`, as long as `memory`, and comes back if the step fails; None where
    nobody minds.
    """

    memory: memoryview
    undo: memoryview | None = None


class Step:
    """One collective at this peer. Read it freely; only the session changes it."""

    def __init__(self, number: int, op: ReduceOp, root: int, trust: StepTrust) -> None:
        miner_count = len(trust.sent)
        self.trust = trust
        self.sample: Sample | None = None  # for an audit, once it is committed
        self.number = number
        self.op = op
        self.root = root
        self.phase = Phase.RUNNING
        self.error: MapReduceError | None = None
        self.tensor: TensorSpec | None = None
        self.segments: tuple[Segment, ...] = ()
        self.involved: tuple[int, ...] = ()
        self.source: memoryview | None = None
        self.target: Target | None = None
        self.uploads = [Upload(length=0) for _ in range(miner_count)]
        self.received = [0] * miner_count
        self.placed = [0] * miner_count  # bytes of each segment of the target that may have changed
        # By this rank's clock: its entry and the commit, each segment's first and last word.
        self.began_at = self.ended_at = 0.0
        self.first_at = [0.0] * miner_count
        self.last_at = [0.0] * miner_count
        self.first_result_at: float | None = None
        self.segment_us = [0] * miner_count  # as this rank states them in its ACKs
        self.acks: dict[int, tuple[int, ...]] = {}  # by miner: what all ranks stated, COMMIT says
        self.committed: set[int] = set()
        self.aborted: dict[int, Abort] = {}
        self.aborted_by: int | None = None  # the miner that told of the abort which ended it here
        self.progress: dict[int, Progress] = {}

    def frame_bytes(self, measured: int, largest: int) -> int:
        """How long a frame may be: a small tensor goes as one, others in what the link takes."""
        if self.tensor is not None and self.tensor.nbytes <= MIN_SEGMENT_BYTES:
            return min(MIN_SEGMENT_BYTES, largest)
        return measured

    def place(self, miner: int, begin: int, end: int) -> memoryview:
        """Memory for bytes `begin` to `end` of the segment; saves what it holds the first time."""
        assert self.target is not None
        offset = self.segments[miner].offset
        where = slice(offset + begin, offset + end)
        if end > self.placed[miner]:
            self.placed[miner] = end
            if self.target.undo is not None:
                # copy: the step is atomic, and the user's tensor must come back if it fails
                self.target.undo[where] = self.target.memory[where]
        return self.target.memory[where]

    def take_result(self, miner: int, nbytes: int) -> None:
        """The next bytes of this segment's result are in place."""
        assert self.target is not None
        begin = self.segments[miner].offset + self.received[miner]
        self.trust.received[miner].add(self.target.memory[begin : begin + nbytes])
        self.received[miner] += nbytes

    def input_memory(self, miner: int) -> memoryview | None:
        """What this rank contributed to the segment, wherever it is once the result is complete;
        None if it contributed nothing."""
        if self.source is None:
            return None
        undo = None if self.target is None else self.target.undo
        segment = self.segments[miner]
        return (undo or self.source)[segment.offset : segment.offset + segment.length]

    def time_segment(self, miner: int, now: float) -> None:
        """A result (or release) of this segment has come."""
        if self.first_result_at is None:
            self.first_result_at = now
        self.first_at[miner] = self.first_at[miner] or now
        self.last_at[miner] = now
        self.segment_us[miner] = min(int((now - self.first_result_at) * 1e6), MAX_SEGMENT_US)

    def fail(self, error: MapReduceError) -> None:
        """Ends the step; the target holds again what it held before."""
        self.phase = Phase.FAILED
        self.error = error
        if self.target is None or self.target.undo is None:
            return
        for segment, placed in zip(self.segments, self.placed, strict=True):
            where = slice(segment.offset, segment.offset + placed)
            self.target.memory[where] = self.target.undo[where]

    def release(self) -> None:
        """Lets go of the caller's memory, once the step is over."""
        assert self.done
        self.source = self.target = None

    def next_weights(self, weights: tuple[int, ...]) -> tuple[int, ...]:
        """The miners' weights after this committed step: every rank computes the same, from what
        all ranks have acknowledged. The median of the ranks counts, so that one cannot shift it."""
        times = [0] * len(weights)
        for miner, said in self.acks.items():
            times[miner] = sorted(said)[len(said) // 2]
        lengths = [segment.length for segment in self.segments]
        return rebalance(weights, lengths, times)

    @property
    def complete(self) -> bool:
        """Whether every miner has certified, and this rank holds all that they have certified."""
        certified = self.trust.certificates
        if any(miner not in certified for miner in self.involved):
            return False
        return self.target is None or all(
            self.received[miner] == self.segments[miner].length for miner in self.involved
        )

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self.phase in (Phase.COMMITTED, Phase.FAILED)

    @property
    def uploading(self) -> bool:
        """Whether bytes of the input are still to be sent."""
        return self.phase is Phase.RUNNING and any(u.sent < u.length for u in self.uploads)

    @property
    def entered(self) -> bool:
        """Whether every rank is known to have entered: a block was reduced, or a miner said so."""
        return (
            any(upload.released for upload in self.uploads)
            or any(self.received)
            or any(progress.phase != Progress.ENTERING for progress in self.progress.values())
        )

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """The ranks (indexes) that miners last said they wait for, without duplicates."""
        return tuple(
            sorted({rank for progress in self.progress.values() for rank in progress.waiting_for})
        )

    @property
    def moved_bytes(self) -> int:
        """Payload bytes sent and received so far: grows while the step is alive."""
        return sum(self.received) + sum(upload.sent for upload in self.uploads)
