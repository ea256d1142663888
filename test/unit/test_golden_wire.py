"""The bytes of the protocol, pinned: a change here is a new protocol version.

`python test/unit/test_golden_wire.py` writes test/golden/wire.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadFrame, BadMessage
from mapreduce.wire.bodies import (
    VERSION_PREFIX,
    Abort,
    Ack,
    Commit,
    Open,
    Progress,
    TensorSpec,
    decode_text,
    encode_text,
    split_signature,
    with_signature,
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
from mapreduce.wire.statements import (
    Acknowledgement,
    Certificate,
    Place,
    Receipt,
    Reject,
    Upload,
    commit_statement,
    grant_digest,
    open_statement,
    session_key_statement,
    step_digest,
)

UPLOAD = {"rank": 2, "nbytes": 77, "root": bytes([5] * 32), "nonce_hash": bytes([6] * 32)}
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "wire.json"

OPENED = Open(
    op=ReduceOp.AVG,
    tensor=TensorSpec(dtype=DType.BFLOAT16, shape=(3, 1 << 20)),
    segment_bytes=0x0102030405,
    map_digest=bytes(range(16)),
    nonce_hash=bytes(range(100, 132)),
)
SIGNATURE = bytes(range(64))
ACKS = tuple(
    Ack(
        segment_us=segment_us,
        nonce=bytes([rank] * 32),
        step_digest=bytes([rank + 16] * 32),
        signature=bytes([rank + 32] * 64),
    )
    for rank, segment_us in enumerate((0, 0x05060708, 9))
)
CERTIFICATE = Certificate(
    place=Place(grant=bytes(range(32)), step=0x05060708, segment=0x090A, epoch=0x01020304),
    op=ReduceOp.AVG,
    dtype=DType.BFLOAT16,
    sender=0,
    nbytes=0x0102030406,
    root=bytes([7] * 32),
    entries=((bytes([1] * 32), bytes([2] * 32)), (bytes([3] * 32), bytes([4] * 32))),
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
    Kind.OPEN: with_signature(OPENED.encode(), SIGNATURE),
    Kind.CREDIT: b"",
    Kind.CLOSE: with_signature(VERSION_PREFIX + bytes(range(32)), SIGNATURE),
    Kind.RECEIPT: with_signature(VERSION_PREFIX, SIGNATURE),
    Kind.REJECT: with_signature(VERSION_PREFIX + bytes(range(32)), SIGNATURE),
    Kind.CERTIFICATE: with_signature(VERSION_PREFIX + CERTIFICATE.content(), SIGNATURE),
    Kind.ACK: ACKS[1].encode(),
    Kind.COMMIT: with_signature(Commit(acks=ACKS).encode(), SIGNATURE),
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
    pinned = bytes.fromhex(json.loads(GOLDEN.read_text())["frames"][kind.name])
    assert frame(kind) == pinned
    assert Header.decode(pinned[:HEADER_BYTES]) == header(kind)


def test_bodies_survive_the_wire() -> None:
    pinned = {k: bytes.fromhex(v) for k, v in json.loads(GOLDEN.read_text())["frames"].items()}
    bodies = {kind: memoryview(data)[HEADER_BYTES:] for kind, data in pinned.items()}
    assert Open.decode(bodies["OPEN"][:-64]) == OPENED
    assert Abort.decode(bodies["ABORT"]) == ABORTED
    assert Ack.decode(bodies["ACK"]) == ACKS[1]
    assert Commit.decode(bodies["COMMIT"], 3) == (Commit(acks=ACKS), SIGNATURE)
    with pytest.raises(BadFrame, match="4 ranks"):
        Commit.decode(bodies["COMMIT"], 4)
    content, signature = split_signature("CERTIFICATE", bodies["CERTIFICATE"], None)
    assert Certificate.from_content(CERTIFICATE.place, content) == CERTIFICATE
    assert signature == SIGNATURE
    root, signature = split_signature("REJECT", bodies["REJECT"], 32)
    assert (root, signature) == (bytes(range(32)), SIGNATURE)
    with pytest.raises(BadFrame, match="97 bytes: 65 are expected"):
        split_signature("RECEIPT", bodies["REJECT"], 0)
    progress = Progress.decode(memoryview(pinned["PING"])[HEADER_BYTES:])
    assert progress == Progress(phase=Progress.REDUCING, waiting_for=(0, 258))
    text = decode_text("GOODBYE", memoryview(pinned["GOODBYE"])[HEADER_BYTES:])
    assert text == "the peer is done"


def statements() -> dict[str, bytes]:
    """What is signed, and what statements are called by."""
    place = CERTIFICATE.place
    upload = UPLOAD | {"place": place}
    return {
        "open": open_statement(place, 2, OPENED.encode()),
        "upload": Upload(**upload).statement(),
        "receipt": Receipt(**upload).statement(),
        "reject": Reject(**upload).statement(),
        "certificate": CERTIFICATE.statement(),
        "certificate digest": CERTIFICATE.digest,
        "acknowledgement": Acknowledgement(
            place=place, rank=1, segment_us=9, nonce=bytes(32), step_digest=bytes([8] * 32)
        ).statement(),
        "commit": commit_statement(place, Commit(acks=ACKS).echoes()),
        "step digest": step_digest({1: bytes(32), 0: bytes([1] * 32)}),
        "grant digest": grant_digest("{}"),
        "session key": session_key_statement("validator", "key"),
    }


def test_statements_are_the_pinned_bytes() -> None:
    """Another byte here, and no proof made before can be checked any more."""
    pinned = json.loads(GOLDEN.read_text())["statements"]
    made = statements()
    assert {name: data.hex() for name, data in made.items()} == pinned
    assert Receipt.from_statement(made["receipt"]).statement() == made["receipt"]
    assert Certificate.from_statement(made["certificate"]) == CERTIFICATE
    with pytest.raises(BadMessage, match="not the bytes of a receipt"):
        Receipt.from_statement(made["upload"])


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
    long = Abort(code="fraud", message="é" * 10_000, proof=bytes(36_000))
    body = long.encode()
    assert len(body) <= MAX_BODY_BYTES
    assert Abort.decode(memoryview(body)).proof == long.proof  # the message makes room for it
    raw = json.dumps({**json.loads(body[1:]), "message": "é" * 8000}, ensure_ascii=False)
    again = Abort.decode(memoryview(VERSION_PREFIX + raw.encode()))
    assert len(again.encode()) <= MAX_BODY_BYTES  # what others wrote more tightly, too


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
    pinned = {
        "frames": {kind.name: frame(kind).hex() for kind in Kind},
        "statements": {name: data.hex() for name, data in statements().items()},
    }
    GOLDEN.write_text(json.dumps(pinned, indent=1) + "\n")
