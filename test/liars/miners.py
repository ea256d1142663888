"""Lying miners: the shipped session with one thing changed.

`python -m test.liars.miners FAULT ...` runs `neurons/miner.py` with such a session; `...` are its
flags.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from mapreduce.core.hash_tree import RootHasher
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.wire.bodies import VERSION_PREFIX, encode_text, with_signature
from mapreduce.wire.frames import HEADER_BYTES, Header, Kind, encode_frame
from mapreduce.wire.miner_session import MinerSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.wire.miner_step import MinerStep


def miner_session(fault: str) -> type[MinerSession]:
    """The session class that tells this lie."""
    return {
        "wrong_block": _tampering(_wrong_block),
        "one_ulp": _tampering(_one_ulp),
        "peer_left_out": _PeerLeftOut,
        "stale_result": _StaleResult,
        "other_input": _OtherInput,
        "two_certificates": _TwoCertificates,
        "two_faced": _TwoFaced,
        "wrong_root": _WrongRoot,
        "false_reject": _FalseReject,
        "truncated": _Truncated,
        "withheld_commit": _WithheldCommit,
    }[fault]


class _Reducer:
    """A reducer whose output `tamper` changes; `offset` counts bytes of the segment."""

    def __init__(self, real: Any, tamper: Callable[[list[Any], memoryview, int], None]) -> None:
        self._real = real
        self._tamper = tamper
        self._offset = 0

    def reduce(self, inputs: list[Any], out: memoryview) -> None:
        self._real.reduce(inputs, out)
        self._tamper(inputs, out, self._offset)
        self._offset += len(out)


class _Tampering(MinerSession):
    """Changes what comes out before it is hashed: the certificate fits what was sent."""

    def tamper(self, inputs: list[Any], out: memoryview, offset: int) -> None:
        raise NotImplementedError

    def _agree(self, step: MinerStep) -> None:
        super()._agree(step)
        if step.reducer is not None:
            step.reducer = _Reducer(step.reducer, self.tamper)  # type: ignore[assignment]


def _tampering(change: Callable[[memoryview], None]) -> type[MinerSession]:
    class Session(_Tampering):
        def tamper(self, inputs: list[Any], out: memoryview, offset: int) -> None:
            if offset == 0:  # the first block of the segment, no other
                change(out[:BLOCK_BYTES])

    return Session


def _wrong_block(block: memoryview) -> None:
    block[:] = bytes(len(block))


def _one_ulp(block: memoryview) -> None:
    np.frombuffer(block, dtype=np.uint32)[0] ^= 1


class _PeerLeftOut(_Tampering):
    """Adds nothing of the last rank, and certifies that it did."""

    def tamper(self, inputs: list[Any], out: memoryview, offset: int) -> None:
        arrays = [np.frombuffer(data, dtype=np.float32) for data in inputs]
        np.frombuffer(out, dtype=np.float32)[:] = sum(arrays[:-1])


class _StaleResult(_Tampering):
    """Works once, and from then on sends that result again."""

    first: bytearray | None = None
    steps = 0

    def tamper(self, inputs: list[Any], out: memoryview, offset: int) -> None:
        if offset == 0:
            self.steps += 1
            self.first = bytearray() if self.steps == 1 else self.first
        assert self.first is not None
        if self.steps == 1:
            self.first += out
        else:
            out[:] = self.first[offset : offset + len(out)]


class _Certifying(MinerSession):
    """Changes the content of certificates; the root of the output begins at byte 12 of it, the
    entries at 46."""

    def change(self, content: bytearray) -> None:
        raise NotImplementedError

    def certificate(self, step: MinerStep, root: bytes | None = None) -> bytes:
        made = step.certificate(self.trust._place(step.number))
        content = bytearray(made.content())
        if root is not None:
            content[12:44] = root
        self.change(content)
        statement = type(made).from_content(made.place, bytes(content)).statement()
        signature = self.trust._sign(statement)
        return with_signature(VERSION_PREFIX + bytes(content), signature)

    def _send_step(self, rank: int, kind: Kind, step: int, body: bytes, offset: int = 0) -> None:
        if kind is Kind.CERTIFICATE:
            assert self._step is not None
            body = self.certificate(self._step)
        super()._send_step(rank, kind, step, body, offset)


class _OtherInput(_Certifying):
    """Certifies another input of the first rank than it gave it a receipt for."""

    def change(self, content: bytearray) -> None:
        content[46] ^= 1


class _WrongRoot(_Certifying):
    """Certifies another output than it sends."""

    def change(self, content: bytearray) -> None:
        content[12] ^= 1


class _TwoCertificates(_WrongRoot):
    """Sends a second certificate behind the right one."""

    def _send_step(self, rank: int, kind: Kind, step: int, body: bytes, offset: int = 0) -> None:
        MinerSession._send_step(self, rank, kind, step, body, offset)
        if kind is Kind.CERTIFICATE:
            super()._send_step(rank, kind, step, body, offset)


class _TwoFaced(_Certifying):
    """Sends the last rank another result than the others, with a certificate that fits it."""

    other: RootHasher

    def _agree(self, step: MinerStep) -> None:
        super()._agree(step)
        self.other = RootHasher()
        if step.reducer is not None:
            step.reducer = _Reducer(step.reducer, self._hash_other)  # type: ignore[assignment]

    def _hash_other(self, inputs: list[Any], out: memoryview, offset: int) -> None:
        self.other.add(memoryview(self._other(bytes(out), offset)))

    @staticmethod
    def _other(payload: bytes, offset: int) -> bytes:
        changed = bytearray(payload)
        if offset == 0:
            changed[0] ^= 1
        return bytes(changed)

    def change(self, content: bytearray) -> None:
        pass

    def _send_step(self, rank: int, kind: Kind, step: int, body: bytes, offset: int = 0) -> None:
        if kind is Kind.CERTIFICATE and rank == self.terms.peer_count - 1:
            assert self._step is not None
            body = self.certificate(self._step, self.other.root())
        MinerSession._send_step(self, rank, kind, step, body, offset)

    def next_output(self, rank: int) -> list[bytes | memoryview]:
        pieces = super().next_output(rank)
        run = self._streams[rank].in_hand
        if pieces and run is not None and pieces[-1] is run.frame:
            header = Header.decode(run.frame[:HEADER_BYTES])
            if rank == self.terms.peer_count - 1:
                payload = self._other(bytes(run.frame[HEADER_BYTES:]), header.offset)
                pieces[-1] = header.encode() + payload
        return pieces


class _FalseReject(MinerSession):
    """Says that the first rank sent something else than it did."""

    def _closed(self, rank: int, header: Header, body: memoryview) -> None:
        step = self._live_step(rank, header)
        if step is not None and rank == 0:
            step.inputs[rank].root = lambda: bytes(32)  # type: ignore[method-assign]
        super()._closed(rank, header, body)


class _Truncated(MinerSession):
    """Says goodbye when half of the result has been sent."""

    def _emit(self, step: MinerStep, inputs: list[memoryview], nbytes: int) -> None:
        super()._emit(step, inputs, nbytes)
        if step.reduced + nbytes > step.length // 2:
            body = encode_text("enough for today")
            for rank in step.readers:
                frame = encode_frame(Header(kind=Kind.GOODBYE, length=len(body)), body)
                self._streams[rank].control.append(frame)
                self.ready.add(rank)


class _WithheldCommit(MinerSession):
    """Never says that everybody has acknowledged, and leaves."""

    def _send_step(self, rank: int, kind: Kind, step: int, body: bytes, offset: int = 0) -> None:
        if kind is Kind.COMMIT:
            kind, body = Kind.GOODBYE, encode_text("nobody has seen me")
        super()._send_step(rank, kind, step, body, offset)


def main(argv: list[str]) -> int:
    """Runs a miner that tells the lie named first."""
    from mapreduce.services import miner_job
    from neurons.miner import main as run

    miner_job.MinerSession = miner_session(argv[0])  # type: ignore[misc]
    sys.argv[1:] = argv[1:]
    return run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
