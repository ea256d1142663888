"""One collective at a miner: who has entered, what has arrived, who has acknowledged. Byte counts
only, no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapreduce.core.hash_tree import RootHasher
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp, Reducer
from mapreduce.errors import BadFrame
from mapreduce.wire.bodies import Open, Progress, TensorSpec, compare_opens
from mapreduce.wire.statements import NO_ROOT, Certificate

if TYPE_CHECKING:
    from mapreduce.wire.bodies import Ack
    from mapreduce.wire.frames import Header
    from mapreduce.wire.proofs import Signed
    from mapreduce.wire.statements import Place


class MinerStep:
    """One collective at this miner. Byte counts are within the segment."""

    def __init__(self, number: int, peer_count: int) -> None:
        self.number = number
        self.inputs = [RootHasher() for _ in range(peer_count)]
        self.output = RootHasher()
        self.opens: list[Open | None] = [None] * peer_count
        self.open_bodies = [b""] * peer_count  # as signed
        self.lengths = [0] * peer_count  # of the segment, as each rank's own OPEN cuts it
        self.received = [0] * peer_count
        self.closed: dict[int, Signed] = {}  # by rank, its upload
        self.acked: dict[int, Ack] = {}
        # Set once every rank has opened and all agree.
        self.reducer: Reducer | None = None
        self.tensor: TensorSpec | None = None
        self.contributors: tuple[int, ...] = ()
        self.readers: tuple[int, ...] = ()
        self.length = 0
        self.reduced = 0
        self.certified = False

    def entered(self) -> tuple[int, ...]:
        return tuple(rank for rank, opened in enumerate(self.opens) if opened is not None)

    def check_data(self, rank: int, header: Header, window_bytes: int) -> None:
        """Raises BadFrame unless this DATA header continues the rank's segment within its
        window."""
        end = header.offset + header.length
        opened = self.opens[rank]
        assert opened is not None
        if opened.op is ReduceOp.BROADCAST and opened.root != rank:
            raise BadFrame("DATA from a rank that receives this broadcast")
        if header.offset != self.received[rank] or rank in self.closed:
            raise BadFrame(f"DATA at {header.offset}, expected at {self.received[rank]}")
        if end > self.lengths[rank]:
            raise BadFrame(f"DATA up to {end} in a segment of {self.lengths[rank]} bytes")
        if header.length % BLOCK_BYTES and end != self.lengths[rank]:
            raise BadFrame(f"DATA of {header.length} bytes is not a run of whole blocks")
        if end - self.reduced > window_bytes:
            raise BadFrame(f"DATA exceeds the window of {window_bytes} bytes")

    def agree(self, frame_bytes: int) -> dict[str, dict[int, str]]:
        """Every rank is in: settles who contributes and who reads, or returns what they disagree
        on."""
        opens = [opened for opened in self.opens if opened is not None]
        assert len(opens) == len(self.opens)
        differences = compare_opens(opens)
        if differences:
            return differences
        everyone = tuple(range(len(opens)))
        self.contributors = self.readers = everyone
        if opens[0].op is ReduceOp.BROADCAST:
            self.contributors = (opens[0].root,)
            self.readers = tuple(rank for rank in everyone if rank != opens[0].root)
        leader = self.contributors[0]
        self.tensor = opens[leader].tensor
        assert self.tensor is not None
        self.length = self.lengths[leader]
        self.reducer = Reducer(self.tensor.dtype, opens[0].op, len(self.contributors), frame_bytes)
        return {}

    def certificate(self, place: Place) -> Certificate:
        """What this miner has made of what it received, once all is reduced."""
        opens = [opened for opened in self.opens if opened is not None]
        assert self.tensor is not None
        roots = [
            self.inputs[rank].root() if rank in self.contributors else NO_ROOT
            for rank in range(len(opens))
        ]
        leader = opens[self.contributors[0]]
        verbatim = leader.op is ReduceOp.BROADCAST
        return Certificate(
            place=place,
            op=leader.op,
            dtype=self.tensor.dtype,
            sender=leader.root,
            nbytes=self.length,
            root=roots[leader.root] if verbatim else self.output.root(),
            entries=tuple(
                (root, opened.nonce_hash) for root, opened in zip(roots, opens, strict=True)
            ),
        )

    def progress(self, behind: tuple[int, ...]) -> Progress:
        """How far the step is and whom it waits for; `behind` are the ranks with results still to
        go out."""
        everyone = range(len(self.opens))
        if self.reducer is None:
            missing = tuple(rank for rank in everyone if self.opens[rank] is None)
            return Progress(phase=Progress.ENTERING, waiting_for=missing)
        if self.certified:
            missing = tuple(rank for rank in everyone if rank not in self.acked)
            return Progress(phase=Progress.COMMITTING, waiting_for=missing)
        least = min(self.received[rank] for rank in self.contributors)
        missing = tuple(rank for rank in self.contributors if self.received[rank] == least)
        held_up = least == self.length or least > self.reduced  # by who reads slowly
        return Progress(phase=Progress.REDUCING, waiting_for=behind if held_up else missing)
