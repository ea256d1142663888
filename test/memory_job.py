"""A whole job in memory: K peer sessions, N miner sessions and the bytes between them, under a
random schedule.

Knows both ends of the protocol and nothing of sockets. Every stream is a pair of byte queues with a
bounded send buffer; `run` lets a seeded random choice decide what moves next, so one seed is one
interleaving.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mapreduce.core.dtypes import dtype_from_numpy
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadFrame
from mapreduce.net.auth import signer
from mapreduce.wire.bodies import TensorSpec
from mapreduce.wire.miner_session import MinerSession
from mapreduce.wire.peer_session import PeerSession, Phase, Step
from mapreduce.wire.peer_step import Target
from mapreduce.wire.peer_trust import Signatory
from test.parties import Parties

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.terms import Terms


@dataclass
class Stream:
    """Both directions between one peer and one miner."""

    to_miner: bytearray = field(default_factory=bytearray)
    to_peer: bytearray = field(default_factory=bytearray)
    open: bool = True


class MemoryJob:
    """K peers and N miners. `socket_bytes` bounds what a socket takes before it is no longer
    writable; `peer` and `miner` make the session of an index, for those that lie."""

    def __init__(
        self,
        terms: Terms,
        seed: int = 0,
        socket_bytes: int = 32 * 1024,
        *,
        audit_budget: float = 0.01,
        peer: Callable[..., PeerSession] = PeerSession,
        miner: Callable[..., MinerSession] = MinerSession,
    ) -> None:
        self.terms = terms
        self.random = random.Random(seed)
        self.socket_bytes = socket_bytes
        self.parties = Parties(terms, audit_budget=audit_budget)
        self.now = 0.0  # seconds; one move takes a millisecond
        self.peers = [
            peer(
                terms,
                Signatory(self.parties.keys, rank, signer(key), self.random.randbytes),
                lambda: self.now,
                audit_budget,
            )
            for rank, key in enumerate(self.parties.sessions)
        ]
        self.miners = [
            miner(terms, m, self.parties.keys, signer(key))
            for m, key in enumerate(self.parties.miners)
        ]
        self.streams = {
            (p, m): Stream() for p in range(terms.peer_count) for m in range(terms.miner_count)
        }
        self.peer_readers = {(p, m): self.peers[p].reader(m) for p, m in self.streams}
        self.miner_readers = {(p, m): self.miners[m].reader(p) for p, m in self.streams}
        for p, m in self.streams:
            self.miners[m].attach(p)
        self.results: list[memoryview | None] = [None] * terms.peer_count
        self.violations: list[BadFrame] = []
        self._moves = self._all_moves()

    # Steps ----------------------------------------------------------------------------------------

    def begin(
        self,
        rank: int,
        op: ReduceOp,
        tensor: np.ndarray | None,
        *,
        root: int = 0,
        contribute: bool = True,
    ) -> Step:
        """Enters a step. The result comes in place of a contribution, which is a copy of `tensor`,
        as with `Peer`; or else to new memory."""

        def allocate(nbytes: int) -> Target:
            undo = None if source is None else memoryview(bytearray(nbytes))
            self.results[rank] = memoryview(bytearray(nbytes)) if source is None else source
            return Target(self.results[rank], undo)

        spec = source = None
        if tensor is not None:
            spec = TensorSpec(dtype=dtype_from_numpy(tensor.dtype), shape=tensor.shape)
            if contribute:
                source = memoryview(tensor.flatten().view(np.uint8))
                self.results[rank] = source
        return self.peers[rank].begin(op, root=root, tensor=spec, source=source, allocate=allocate)

    def all_reduce(self, tensors: list[np.ndarray], op: ReduceOp = ReduceOp.AVG) -> list[Step]:
        return [self.begin(rank, op, tensor) for rank, tensor in enumerate(tensors)]

    # Schedule -------------------------------------------------------------------------------------

    def run(self, moves: int = 100_000) -> None:
        """Moves bytes in random order until nothing moves any more."""
        if self.run_some(moves) == moves:
            raise AssertionError("the job does not come to rest")

    def run_some(self, moves: int) -> int:
        """At most `moves` random moves; returns how many there were to make."""
        for done in range(moves):
            begin = self.random.randrange(len(self._moves))
            for enabled, move, key in self._moves[begin:] + self._moves[:begin]:
                if enabled(key):
                    move(key)
                    self.now += 0.001
                    break
            else:
                return done
        return moves

    def _all_moves(self) -> list[tuple]:
        moves: list[tuple] = []
        for key, stream in self.streams.items():
            p, m = key
            peer, miner = self.peers[p], self.miners[m]
            moves += [
                (lambda _, s=stream: s.open and s.to_miner, self._deliver_to_miner, key),
                (lambda _, s=stream: s.open and s.to_peer, self._deliver_to_peer, key),
                (
                    lambda _, s=stream, peer=peer, m=m: s.open and peer._control[m],
                    self._peer_control,
                    key,
                ),
                (
                    lambda _, s=stream, miner=miner, p=p: (
                        s.open and p in miner.ready and len(s.to_peer) < self.socket_bytes
                    ),
                    self._miner_output,
                    key,
                ),
            ]
        moves += [
            (self._uploadable, self._peer_upload, p) for p in range(self.terms.peer_count)
        ] * self.terms.miner_count
        self.random.shuffle(moves)
        return moves

    def _writable(self, p: int):
        return lambda m: (
            self.streams[p, m].open and len(self.streams[p, m].to_miner) < self.socket_bytes
        )

    def _uploadable(self, p: int) -> bool:
        step = self.peers[p].step
        if step is None or step.phase is not Phase.RUNNING or step.source is None:
            return False
        return any(
            self._writable(p)(m)
            and upload.sendable(self.peers[p].terms.window_bytes, self.terms.frame_bytes)
            for m, upload in enumerate(step.uploads)
        )

    def _peer_upload(self, p: int) -> None:
        patient = self.random.random() < 0.5
        blocks = self.random.randint(1, self.terms.frame_bytes // BLOCK_BYTES)
        self.peers[p].frame_bytes = blocks * BLOCK_BYTES
        upload = self.peers[p].next_upload(self._writable(p), patient=patient)
        if upload is not None:
            m, pieces = upload
            self.streams[p, m].to_miner += b"".join(pieces)
            self.peers[p].flushed(m)

    def _peer_control(self, key: tuple[int, int]) -> None:
        p, m = key
        frames = self.peers[p].take_control(m)
        assert frames
        self.streams[key].to_miner += b"".join(frames)

    def _miner_output(self, key: tuple[int, int]) -> None:
        p, m = key
        if pieces := self.miners[m].next_output(p):
            self.streams[key].to_peer += b"".join(pieces)
            self.miners[m].output_done(p)
            self.miners[m].reduce()

    def _take(self, queue: bytearray) -> bytes:
        count = self.random.choice((1, 20, 32, 5000, 16384, 1 << 20))
        data = bytes(queue[:count])
        del queue[:count]
        return data

    def _deliver_to_miner(self, key: tuple[int, int]) -> None:
        try:
            self.miner_readers[key].feed(self._take(self.streams[key].to_miner))
            self.miners[key[1]].reduce()
        except BadFrame as error:
            self.violations.append(error)
            self.cut(*key, f"protocol violation: {error}")

    def _deliver_to_peer(self, key: tuple[int, int]) -> None:
        try:
            self.peer_readers[key].feed(self._take(self.streams[key].to_peer))
        except BadFrame as error:
            self.violations.append(error)
            self.cut(*key, f"protocol violation: {error}")

    # Faults ---------------------------------------------------------------------------------------

    def cut(self, p: int, m: int, reason: str = "connection reset") -> None:
        """Breaks one stream, as both ends see it."""
        stream = self.streams[p, m]
        if stream.open:
            stream.open = False
            self.miners[m].detach(p, reason)
            self.miners[m].reduce()
            self.peers[p].miner_lost(m, reason)

    def kill_peer(self, p: int) -> None:
        for m in range(self.terms.miner_count):
            self.cut(p, m, "connection closed")

    def kill_miner(self, m: int) -> None:
        for p in range(self.terms.peer_count):
            self.cut(p, m, "connection closed")
