"""What the parties of a job sign: the exact bytes, and nothing around them.

Knows layouts; knows no key and no session. Every statement names its kind and its place, so a
signature can be used for nothing else and in no other step. Whoever holds a statement, its
signature and the grant can show both to anyone (`proofs.py`).

| statement | signed by | says |
|---|---|---|
| open | peer | it enters the step like this, and is committed to a nonce |
| upload | peer | it has sent these bytes |
| receipt, reject | miner | it has received them; or others |
| certificate | miner | from these inputs it has made this output |
| acknowledgement | peer | it holds the whole result, as these certificates say; shows its nonce |
| commit | miner | the acknowledgements of all ranks, echoed |
| completion | peer | how the step went, for its validator |

The signed bytes are `mapreduce/1 <kind>`, a newline, the place and the content; integers are
little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from mapreduce.core.dtypes import DType
from mapreduce.core.hash_tree import DIGEST_BYTES
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadMessage, UnsupportedTensor
from mapreduce.wire.terms import MAX_MINERS, MAX_PEERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

SIGNATURE_BYTES = 64
NO_ROOT = bytes(DIGEST_BYTES)  # of a rank that contributes nothing
_GRANT_CONTEXT = "mapreduce 1 grant"
_CERTIFICATE_CONTEXT = "mapreduce 1 certificate"
_STEP_CONTEXT = "mapreduce 1 step"

_PLACE = struct.Struct("<32sIIH")
_UPLOAD = struct.Struct("<HQ32s32s")
_CERTIFICATE = struct.Struct("<BBHQ32sH")
_ENTRY = struct.Struct("<32s32s")
_ACK = struct.Struct("<HI32s32s")
_COMPLETION = struct.Struct("<HBH")
_SEGMENT = struct.Struct("<32sQI")
_INDEX = struct.Struct("<H")


def _signed(kind: str, content: bytes) -> bytes:
    return f"mapreduce/1 {kind}\n".encode() + content


def grant_digest(text: str) -> bytes:
    """What statements call the grant: hash of the text that its validator signed first; a renewed
    grant keeps it."""
    return blake3(text.encode(), derive_key_context=_GRANT_CONTEXT).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a statement belongs: one segment of one step of one job."""

    grant: bytes
    step: int
    segment: int
    epoch: int = 0

    def encode(self) -> bytes:
        return _PLACE.pack(self.grant, self.epoch, self.step, self.segment)

    @classmethod
    def decode(cls, data: bytes) -> Place:
        grant, epoch, step, segment = _PLACE.unpack_from(data)
        return cls(grant=grant, epoch=epoch, step=step, segment=segment)


def open_statement(place: Place, rank: int, body: bytes) -> bytes:
    """What a peer signs of its OPEN: the whole body in front of the signature."""
    return _signed("open", place.encode() + _INDEX.pack(rank) + body)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfUpload:
    place: Place
    rank: int
    nbytes: int
    root: bytes
    nonce_hash: bytes

    KIND = ""

    def statement(self) -> bytes:
        content = _UPLOAD.pack(self.rank, self.nbytes, self.root, self.nonce_hash)
        return _signed(self.KIND, self.place.encode() + content)

    @classmethod
    def from_statement(cls, statement: bytes) -> Self:
        """Raises BadMessage unless these are the bytes of such a statement."""
        content = _content(cls.KIND, statement)
        if len(content) != _PLACE.size + _UPLOAD.size:
            raise BadMessage(f"{cls.KIND} of {len(content)} bytes")
        rank, nbytes, root, nonce_hash = _UPLOAD.unpack_from(content, _PLACE.size)
        return cls(
            place=Place.decode(content), rank=rank, nbytes=nbytes, root=root, nonce_hash=nonce_hash
        )


class Upload(_OfUpload):
    """A peer has sent `nbytes` with this root, and is committed to a nonce."""

    __slots__ = ()
    KIND = "upload"


class Receipt(_OfUpload):
    """The miner has received what the rank says it sent."""

    __slots__ = ()
    KIND = "receipt"


class Reject(_OfUpload):
    """The miner has received as many bytes, but with this root, which is not the rank's."""

    __slots__ = ()
    KIND = "reject"


def _content(kind: str, statement: bytes) -> bytes:
    prefix = _signed(kind, b"")
    if not statement.startswith(prefix):
        raise BadMessage(f"these are not the bytes of a {kind}")
    return statement[len(prefix) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """From inputs with these roots the miner has made an output with that root.

    `entries` are (root, nonce hash) by rank; in a broadcast from `sender` every root but that
    rank's is `NO_ROOT`.
    """

    place: Place
    op: ReduceOp
    dtype: DType
    sender: int
    nbytes: int
    root: bytes
    entries: tuple[tuple[bytes, bytes], ...]

    @property
    def contributors(self) -> tuple[int, ...]:
        """The ranks whose inputs went into the output."""
        if self.op is ReduceOp.BROADCAST:
            return (self.sender,)
        return tuple(range(len(self.entries)))

    @property
    def readers(self) -> int:
        """How many ranks got the output."""
        return len(self.entries) - (self.op is ReduceOp.BROADCAST)

    def content(self) -> bytes:
        """What stands in the CERTIFICATE frame: all but the place."""
        head = _CERTIFICATE.pack(
            self.op, self.dtype, self.sender, self.nbytes, self.root, len(self.entries)
        )
        return head + b"".join(_ENTRY.pack(*entry) for entry in self.entries)

    def statement(self) -> bytes:
        return _signed("certificate", self.place.encode() + self.content())

    @property
    def digest(self) -> bytes:
        """What acknowledgements and completions call it."""
        return blake3(self.statement(), derive_key_context=_CERTIFICATE_CONTEXT).digest()

    @classmethod
    def from_content(cls, place: Place, content: bytes) -> Certificate:
        """Raises BadMessage unless these are the bytes of a certificate that makes sense."""
        if len(content) < _CERTIFICATE.size:
            raise BadMessage(f"certificate of {len(content)} bytes")
        op, dtype, sender, nbytes, root, count = _CERTIFICATE.unpack_from(content)
        if not 1 <= count <= MAX_PEERS or len(content) != _CERTIFICATE.size + count * _ENTRY.size:
            raise BadMessage(f"certificate of {len(content)} bytes for {count} ranks")
        try:
            made = cls(
                place=place,
                op=ReduceOp(op),
                dtype=DType(dtype),
                sender=sender,
                nbytes=nbytes,
                root=root,
                entries=tuple(_ENTRY.iter_unpack(content[_CERTIFICATE.size :])),
            )
        except (ValueError, UnsupportedTensor) as error:
            raise BadMessage(f"certificate names what this side does not know: {error}") from None
        if sender >= count or nbytes % made.dtype.itemsize:
            raise BadMessage(f"certificate of {nbytes} bytes from rank {sender} of {count}")
        return made

    @classmethod
    def from_statement(cls, statement: bytes) -> Certificate:
        """The same, from the signed bytes."""
        content = _content("certificate", statement)
        if len(content) < _PLACE.size:
            raise BadMessage(f"certificate of {len(content)} bytes")
        return cls.from_content(Place.decode(content), content[_PLACE.size :])


def step_digest(certificates: Mapping[int, bytes]) -> bytes:
    """One hash for the digests of a step's certificates, by segment: equal for all ranks unless
    they were shown different ones."""
    parts = (_INDEX.pack(segment) + certificates[segment] for segment in sorted(certificates))
    return blake3(b"".join(parts), derive_key_context=_STEP_CONTEXT).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """The rank holds the whole result, made as the certificates of `step_digest` say; `nonce` is
    the one it was committed to for this segment, which took it `segment_us` microseconds."""

    place: Place
    rank: int
    segment_us: int
    nonce: bytes
    step_digest: bytes

    def statement(self) -> bytes:
        content = _ACK.pack(self.rank, self.segment_us, self.nonce, self.step_digest)
        return _signed("acknowledgement", self.place.encode() + content)


def commit_statement(place: Place, echoes: bytes) -> bytes:
    """What a miner signs of its COMMIT: the acknowledgements as they stand in the body."""
    return _signed("commit", place.encode() + echoes)


def grant_statement(text: str) -> bytes:
    """What a validator signs of a grant: its text."""
    return _signed("grant", text.encode())


def session_key_statement(validator: str, session_key: str) -> bytes:
    """What a hotkey signs when it joins: this session key speaks for it in the validator's job."""
    return _signed("session key", f"{validator}\n{session_key}".encode())


class SegmentOutcome(NamedTuple):
    """One segment of a step as one rank saw it: digest of the certificate (`NO_ROOT` if it has
    none), bytes, and microseconds from the step's first result to the segment's last."""

    certificate: bytes
    nbytes: int
    segment_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """How a step ended at one rank. `segments` are in segment order, one per miner; `sampled` is
    the segment of which the rank keeps blocks, None if it keeps none."""

    COMMITTED, FAILED = 1, 2
    _NONE = 0xFFFF

    grant: bytes
    step: int
    rank: int
    outcome: int
    sampled: int | None
    segments: tuple[SegmentOutcome, ...]

    def content(self) -> bytes:
        """All but the kind."""
        place = Place(
            grant=self.grant,
            step=self.step,
            segment=self._NONE if self.sampled is None else self.sampled,
        )
        head = _COMPLETION.pack(self.rank, self.outcome, len(self.segments))
        return place.encode() + head + b"".join(_SEGMENT.pack(*s) for s in self.segments)

    def statement(self) -> bytes:
        return _signed("completion", self.content())

    @classmethod
    def from_content(cls, content: bytes) -> Completion:
        """Raises BadMessage unless these are the bytes of a completion."""
        size = _PLACE.size + _COMPLETION.size
        if len(content) < size:
            raise BadMessage(f"completion of {len(content)} bytes")
        place = Place.decode(content)
        rank, outcome, count = _COMPLETION.unpack_from(content, _PLACE.size)
        if not 1 <= count <= MAX_MINERS or len(content) != size + count * _SEGMENT.size:
            raise BadMessage(f"completion of {len(content)} bytes for {count} segments")
        sampled = None if place.segment == cls._NONE else place.segment
        known = outcome in (cls.COMMITTED, cls.FAILED)
        if not known or (sampled is not None and sampled >= count):
            raise BadMessage(f"completion with outcome {outcome}, segment {sampled}")
        segments = tuple(map(SegmentOutcome._make, _SEGMENT.iter_unpack(content[size:])))
        return cls(
            grant=place.grant,
            step=place.step,
            rank=rank,
            outcome=outcome,
            sampled=sampled,
            segments=segments,
        )
