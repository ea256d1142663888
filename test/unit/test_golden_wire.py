"""The bytes of the protocol, pinned: a change here is a new protocol version.

`python test/unit/test_golden_wire.py` writes test/golden/wire.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadFrame
from mapreduce.wire.bodies import (
    EMPTY_BODY,
    Abort,
    Ack,
    Commit,
    Open,
    Progress,
    TensorSpec,
    decode_text,
    encode_text,
)
from mapreduce.wire.frames import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    REPLY,
    FrameReader,
    Header,
    Kind,
    encode_frame,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "wire.json"

OPENED = Open(
    op=ReduceOp.AVG,
    tensor=TensorSpec(dtype=DType.BFLOAT16, shape=(3, 1 << 20)),
    segment_bytes=0x0102030405,
    map_digest=bytes(range(16)),
)
ABORTED = Abort(
    code="mismatch",
    message="ranks disagree",
    rank=2,
    miner=None,
    differences={"shape": {0: "(3,)", 1: "(4,)"}},
)
BODIES = {
    Kind.HELLO: bytes(range(32)),
    Kind.OPEN: OPENED.encode(),
    Kind.CREDIT: b"",
    Kind.CLOSE: EMPTY_BODY,
    Kind.CERTIFICATE: EMPTY_BODY,
    Kind.ACK: Ack(segment_us=0x01020304).encode(),
    Kind.COMMIT: Commit(segment_us=(0, 0x05060708, 9)).encode(),
    Kind.ABORT: ABORTED.encode(),
    Kind.PING: Progress(phase=Progress.REDUCING, waiting_for=(0, 258)).encode(),
    Kind.GOODBYE: encode_text("the peer is done"),
}


def header(kind: Kind) -> Header:
    """A header in which every field has a value of its own."""
    return Header(
        kind=kind,
        flags=REPLY if kind is Kind.PING else 0,
        epoch=0x01020304,
        step=0x05060708,
        segment=0x090A,
        rank=0x0B0C,
        offset=0x0D0E0F1011121314,
        length=len(BODIES[kind]) if kind in BODIES else 0x00151617,
    )


def frame(kind: Kind) -> bytes:
    return encode_frame(header(kind), BODIES[kind]) if kind in BODIES else header(kind).encode()


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_frames_are_the_pinned_bytes(kind: Kind) -> None:
    pinned = bytes.fromhex(json.loads(GOLDEN.read_text())[kind.name])
    assert frame(kind) == pinned
    assert Header.decode(pinned[:HEADER_BYTES]) == header(kind)


def test_bodies_survive_the_wire() -> None:
    pinned = {k: bytes.fromhex(v) for k, v in json.loads(GOLDEN.read_text()).items()}
    assert Open.decode(memoryview(pinned["OPEN"])[HEADER_BYTES:]) == OPENED
    assert Abort.decode(memoryview(pinned["ABORT"])[HEADER_BYTES:]) == ABORTED
    ack = Ack.decode(memoryview(pinned["ACK"])[HEADER_BYTES:])
    assert ack == Ack(segment_us=0x01020304)
    commit = memoryview(pinned["COMMIT"])[HEADER_BYTES:]
    assert Commit.decode(commit, 3).segment_us == (0, 0x05060708, 9)
    with pytest.raises(BadFrame, match="4 ranks"):
        Commit.decode(commit, 4)
    progress = Progress.decode(memoryview(pinned["PING"])[HEADER_BYTES:])
    assert progress == Progress(phase=Progress.REDUCING, waiting_for=(0, 258))
    text = decode_text("GOODBYE", memoryview(pinned["GOODBYE"])[HEADER_BYTES:])
    assert text == "the peer is done"


def test_a_reason_is_harmless_in_a_log() -> None:
    assert decode_text("GOODBYE", memoryview(encode_text("a\nb\x1b[31m\u202e"))) == "a b [31m "


def test_an_abort_fits_its_frame_whatever_the_ranks_said() -> None:
    said = dict.fromkeys(range(256), "(" + "é" * 5000 + ")")
    abort = Abort(code="mismatch", message="x" * 10_000, differences={"shape": said, "op": said})
    body = abort.encode()
    assert len(body) <= MAX_BODY_BYTES
    again = Abort.decode(memoryview(body))
    assert 0 in again.differences["shape"]
    assert again.encode() == body  # a miner passes it on


def test_headers_survive_the_wire_and_any_cut() -> None:
    seen: list[tuple[Header, bytes]] = []

    def payload_buffer(header: Header, received: int) -> memoryview:
        return memoryview(bytearray(min(7, header.length - received)))

    def frame_received(header: Header, body: memoryview) -> None:
        seen.append((header, bytes(body)))

    frames = [
        (Header(kind=Kind.PING, flags=1, step=3, segment=2, rank=1, length=4), b"abcd"),
        (Header(kind=Kind.CREDIT, step=2**32 - 1, offset=2**40), b""),
    ]
    data = b"".join(encode_frame(h, b) for h, b in frames)
    data += Header(kind=Kind.DATA, length=20).encode() + bytes(20)
    for cut in range(1, len(data)):
        seen.clear()
        reader = FrameReader(payload_buffer, frame_received)
        reader.feed(data[:cut])
        reader.feed(data[cut:])
        assert seen[:2] == frames
        assert len(seen) == 3


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({kind.name: frame(kind).hex() for kind in Kind}, indent=1) + "\n")
