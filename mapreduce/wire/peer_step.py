"""One collective as its peer sees it: what was sent, what came, who has spoken. Changed only by the
session."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from mapreduce.wire.bodies import Abort, Progress, TensorSpec
from mapreduce.wire.schedule import Upload

if TYPE_CHECKING:
    from mapreduce.core.partition import Segment
    from mapreduce.core.reduce import ReduceOp
    from mapreduce.errors import MapReduceError


class Phase(enum.Enum):
    """Where a step stands."""

    RUNNING = enum.auto()  # may still be aborted by anyone
    ACKNOWLEDGED = enum.auto()  # holds the whole result; bound until a miner says how it ended
    IN_DOUBT = enum.auto()  # the miners that could say are gone; the validator may know
    COMMITTED = enum.auto()
    FAILED = enum.auto()


class Step:
    """One collective at this peer. Read it freely; only the session changes it."""

    def __init__(self, number: int, op: ReduceOp, root: int, miner_count: int) -> None:
        self.number = number
        self.op = op
        self.root = root
        self.phase = Phase.RUNNING
        self.error: MapReduceError | None = None
        self.tensor: TensorSpec | None = None
        self.segments: tuple[Segment, ...] = ()
        self.involved: tuple[int, ...] = ()
        self.source: memoryview | None = None
        self.result: memoryview | None = None
        self.uploads = [Upload(length=0) for _ in range(miner_count)]
        self.received = [0] * miner_count
        self.certified: set[int] = set()
        self.committed: set[int] = set()
        self.aborted: dict[int, Abort] = {}
        self.progress: dict[int, Progress] = {}

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
