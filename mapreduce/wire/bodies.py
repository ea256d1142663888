"""Bodies of the control frames. Knows their bytes and limits; knows nothing of sessions or sockets.

Every body starts with a version byte, so that a later protocol can put more into it. OPEN, CLOSE,
RECEIPT, REJECT, CERTIFICATE, ACK and COMMIT end with a signature; what is signed is in
`statements.py`, since it names more than a frame has to repeat.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mapreduce.core.dtypes import DType
from mapreduce.core.hash_tree import DIGEST_BYTES
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadFrame, UnsupportedTensor
from mapreduce.wire.frames import MAX_BODY_BYTES
from mapreduce.wire.statements import SIGNATURE_BYTES, Acknowledgement
from mapreduce.wire.terms import MAX_PEERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mapreduce.wire.statements import Place

BODY_VERSION = 3
VERSION_PREFIX = bytes([BODY_VERSION])
NONCE_BYTES = 32
MAP_DIGEST_BYTES = 16
MAX_DIMENSIONS = 64  # torch's own limit
MAX_TEXT_BYTES = 8 * 1024
MAX_MESSAGE_CHARS = 2048
MAX_DIFFERENCES = 8  # arguments of a collective that ranks can disagree on
MAX_VALUE_CHARS = 512
MAX_NAME_CHARS = 64

_OPEN = struct.Struct("<BBBBHHQ16s32s")
_HAS_TENSOR = 1
_PROGRESS = struct.Struct("<BBH")
_ACK = struct.Struct("<BI32s32s64s")
_COMMIT = struct.Struct("<BH")
_ECHO = struct.Struct("<I32s32s64s")
MAX_SEGMENT_US = (1 << 32) - 1


def _check_version(kind: str, body: memoryview, minimum: int) -> None:
    if len(body) < minimum:
        raise BadFrame(f"{kind} body of {len(body)} bytes is too short: {minimum} are needed")
    if body[0] != BODY_VERSION:
        raise BadFrame(f"{kind} body has version {body[0]}, this side speaks {BODY_VERSION}")


def with_signature(content: bytes, signature: bytes) -> bytes:
    """The body of a signed frame; `content` begins with the version."""
    assert len(signature) == SIGNATURE_BYTES
    return content + signature


def split_signature(kind: str, body: memoryview, content_bytes: int | None) -> tuple[bytes, bytes]:
    """Content (without the version) and signature of a signed body; `content_bytes` is what the
    content must have, None for any length. Raises BadFrame."""
    shortest = 1 + (content_bytes or 0) + SIGNATURE_BYTES
    _check_version(kind, body, shortest)
    if content_bytes is not None and len(body) != shortest:
        raise BadFrame(f"{kind} body of {len(body)} bytes: {shortest} are expected")
    return bytes(body[1:-SIGNATURE_BYTES]), bytes(body[-SIGNATURE_BYTES:])


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Dtype and shape of a tensor; C-contiguous on the wire."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """How one rank enters a step.

    `tensor` is None for a rank that receives a broadcast and does not know what comes; `root` is
    the index of the rank that sends it, 0 in an all-reduce. `map_digest` identifies the cut into
    segments, of which the receiver's own has `segment_bytes`; `nonce_hash` commits the rank to the
    nonce that its ACK shows.
    """

    op: ReduceOp
    root: int = 0
    tensor: TensorSpec | None
    segment_bytes: int = 0
    map_digest: bytes = bytes(MAP_DIGEST_BYTES)
    nonce_hash: bytes = bytes(DIGEST_BYTES)

    def encode(self) -> bytes:
        """All but the signature."""
        tensor = self.tensor
        shape = () if tensor is None else tensor.shape
        return _OPEN.pack(
            BODY_VERSION,
            self.op,
            0 if tensor is None else tensor.dtype,
            0 if tensor is None else _HAS_TENSOR,
            self.root,
            len(shape),
            self.segment_bytes,
            self.map_digest,
            self.nonce_hash,
        ) + struct.pack(f"<{len(shape)}Q", *shape)

    @classmethod
    def decode(cls, body: memoryview) -> Open:
        _check_version("OPEN", body, _OPEN.size)
        _, op, dtype, flags, root, ndim, segment_bytes, digest, nonce = _OPEN.unpack_from(body)
        if ndim > MAX_DIMENSIONS or len(body) != _OPEN.size + 8 * ndim:
            raise BadFrame(f"OPEN body of {len(body)} bytes does not hold {ndim} dimensions")
        try:
            tensor = None
            if flags & _HAS_TENSOR:
                shape = struct.unpack_from(f"<{ndim}Q", body, _OPEN.size)
                tensor = TensorSpec(dtype=DType(dtype), shape=shape)
            return cls(
                op=ReduceOp(op),
                root=root,
                tensor=tensor,
                segment_bytes=segment_bytes,
                map_digest=digest,
                nonce_hash=nonce,
            )
        except (ValueError, UnsupportedTensor) as error:
            raise BadFrame(f"OPEN names what this side does not know: {error}") from None


def compare_opens(opens: list[Open]) -> dict[str, dict[int, str]]:
    """What the ranks (list index) disagree on: argument -> {rank index: what it said}; empty if
    they agree.

    A rank that receives a broadcast without a tensor agrees with any dtype and shape.
    """
    fields: dict[str, Callable[[Open], str | None]] = {
        "op": lambda o: o.op.label,
        "root": lambda o: f"rank {o.root + 1}",
        "dtype": lambda o: o.tensor.dtype.label if o.tensor else None,
        "shape": lambda o: str(tuple(o.tensor.shape)) if o.tensor else None,
        "segments": lambda o: (
            f"{o.segment_bytes} bytes of map {o.map_digest.hex()}" if o.tensor else None
        ),
    }
    differences = {}
    for name, read in fields.items():
        said = {rank: text for rank, o in enumerate(opens) if (text := read(o)) is not None}
        if len(set(said.values())) > 1:
            differences[name] = said
    if len(differences) > 1:
        differences.pop("segments", None)  # other tensors are cut otherwise
    return differences


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A rank holds the whole result, as the certificates of `step_digest` say. `segment_us` is how
    long this miner's segment took it, in microseconds from the step's first result to the segment's
    last, 0 if that says nothing; `nonce` what its OPEN was committed to."""

    segment_us: int
    nonce: bytes
    step_digest: bytes
    signature: bytes

    def statement(self, place: Place, rank: int) -> bytes:
        """What the rank with this index signs of it."""
        return Acknowledgement(
            place=place,
            rank=rank,
            segment_us=self.segment_us,
            nonce=self.nonce,
            step_digest=self.step_digest,
        ).statement()

    def encode(self) -> bytes:
        return _ACK.pack(
            BODY_VERSION, self.segment_us, self.nonce, self.step_digest, self.signature
        )

    @classmethod
    def decode(cls, body: memoryview) -> Ack:
        _check_version("ACK", body, _ACK.size)
        if len(body) != _ACK.size:
            raise BadFrame(f"ACK body of {len(body)} bytes: {_ACK.size} are expected")
        _, segment_us, nonce, step_digest, signature = _ACK.unpack(body)
        return cls(segment_us=segment_us, nonce=nonce, step_digest=step_digest, signature=signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Every rank has acknowledged; `acks` are what each of them, in rank order, has signed."""

    acks: tuple[Ack, ...]

    def echoes(self) -> bytes:
        """The acknowledgements as they stand in the body: what the miner signs."""
        return b"".join(
            _ECHO.pack(ack.segment_us, ack.nonce, ack.step_digest, ack.signature)
            for ack in self.acks
        )

    def encode(self) -> bytes:
        """All but the miner's signature."""
        return _COMMIT.pack(BODY_VERSION, len(self.acks)) + self.echoes()

    @classmethod
    def decode(cls, body: memoryview, peer_count: int) -> tuple[Commit, bytes]:
        """The commit and the miner's signature."""
        _check_version("COMMIT", body, _COMMIT.size)
        count = _COMMIT.unpack_from(body)[1]
        size = _COMMIT.size + _ECHO.size * count
        if count != peer_count or len(body) != size + SIGNATURE_BYTES:
            raise BadFrame(f"COMMIT body of {len(body)} bytes does not hold {peer_count} ranks")
        return cls(acks=acks_from(bytes(body[_COMMIT.size : size]))), bytes(body[size:])


def acks_from(echoes: bytes) -> tuple[Ack, ...]:
    """The acknowledgements of a COMMIT; raises struct.error unless they are whole."""
    return tuple(
        Ack(segment_us=segment_us, nonce=nonce, step_digest=step_digest, signature=signature)
        for segment_us, nonce, step_digest, signature in _ECHO.iter_unpack(echoes)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Why a step has failed. Ranks are indexes from 0; `rank` is who caused it, None where no rank
    did.

    `code` is one of `Abort.CODES`; `miner` the index of the miner that was lost, or that it is
    about; `differences` maps an argument of the collective to what each rank (index) said; `proof`
    is what `proofs.encode_claim` gives, or, of a dispute, the miner's signed reject.
    """

    CODES = frozenset(
        {"mismatch", "peer_lost", "peer_abort", "peer_timeout", "miner_lost", "dispute", "fraud"}
    )

    code: str
    message: str
    rank: int | None = None
    miner: int | None = None
    differences: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    proof: bytes = b""

    def encode(self) -> bytes:
        """As JSON of at most MAX_BODY_BYTES: of long differences the first ranks stay, a long
        message is cut, and what proves nothing in halves is left out."""
        for ranks, characters, proof in (
            *((MAX_PEERS >> cut, MAX_MESSAGE_CHARS, self.proof) for cut in range(10)),
            (0, MAX_VALUE_CHARS, self.proof),
            (0, MAX_VALUE_CHARS, b""),
        ):
            differences = {
                name: {rank: text[:MAX_VALUE_CHARS] for rank, text in sorted(said.items())[:ranks]}
                for name, said in sorted(self.differences.items())[:MAX_DIFFERENCES]
            }
            document = {
                "code": self.code,
                "message": self.message[:characters],
                "rank": self.rank,
                "miner": self.miner,
                "differences": differences,
                "proof": base64.b64encode(proof).decode(),
            }
            body = VERSION_PREFIX + json.dumps(document).encode()
            if len(body) <= MAX_BODY_BYTES:
                break
        return body

    @classmethod
    def decode(cls, body: memoryview) -> Abort:
        _check_version("ABORT", body, 1)
        try:
            document = json.loads(bytes(body[1:]))
            code, message = str(document["code"]), printable(str(document["message"]))
            rank, miner = document["rank"], document["miner"]
            differences = {
                printable(str(field_name))[:MAX_NAME_CHARS]: {
                    int(rank): printable(str(value)) for rank, value in by_rank.items()
                }
                for field_name, by_rank in document["differences"].items()
            }
            proof = base64.b64decode(document["proof"], validate=True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadFrame(f"ABORT body cannot be read: {error!r}") from None
        integers = all(value is None or type(value) is int for value in (rank, miner))
        if code not in cls.CODES or not integers:
            raise BadFrame(f"ABORT body has impossible values: code {code!r}")
        return cls(
            code=code,
            message=message,
            rank=rank,
            miner=miner,
            differences=differences,
            proof=proof,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A miner's answer to PING: how far the caller's step is, and the ranks (indexes) it waits
    for."""

    ENTERING, REDUCING, COMMITTING = 1, 2, 3

    phase: int
    waiting_for: tuple[int, ...]

    def encode(self) -> bytes:
        count = len(self.waiting_for)
        return _PROGRESS.pack(BODY_VERSION, self.phase, count) + struct.pack(
            f"<{count}H", *self.waiting_for
        )

    @classmethod
    def decode(cls, body: memoryview) -> Progress:
        _check_version("PING", body, _PROGRESS.size)
        _, phase, count = _PROGRESS.unpack_from(body)
        if len(body) != _PROGRESS.size + 2 * count:
            raise BadFrame(f"PING body of {len(body)} bytes does not hold {count} ranks")
        return cls(phase=phase, waiting_for=struct.unpack_from(f"<{count}H", body, _PROGRESS.size))


def encode_text(text: str) -> bytes:
    """A reason for GOODBYE, cut to `MAX_TEXT_BYTES`."""
    return VERSION_PREFIX + text.encode()[:MAX_TEXT_BYTES]


def decode_text(kind: str, body: memoryview) -> str:
    """The reason in a GOODBYE; printable characters only, since it ends in logs."""
    _check_version(kind, body, 1)
    return printable(bytes(body[1 : 1 + MAX_TEXT_BYTES]).decode(errors="replace"))


def printable(text: str) -> str:
    """What a stranger wrote, without what drives terminals or cannot be encoded."""
    return "".join(character if character.isprintable() else " " for character in text)
