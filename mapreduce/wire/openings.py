"""What a peer shows its validator of a step: evidence and opened blocks, as bytes.

Knows layouts and their bounds; knows neither who sends them nor what they prove (`audit.py`). A
body holds as many openings as fit the limit of a control request, so it takes several for many; the
first one carries the evidence.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.core.hash_tree import block_bytes, path_bytes
from mapreduce.errors import BadMessage
from mapreduce.wire.messages import MAX_MESSAGE_BYTES
from mapreduce.wire.proofs import MAX_STATEMENT_BYTES, Opening, Signed
from mapreduce.wire.statements import SIGNATURE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.wire.samples import Evidence

_HEAD = struct.Struct("<IHHH")  # step, segment, number of the first opening, bytes of the statement
_COMMIT = struct.Struct("<HH")  # segment of the commit, bytes of its echoes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One body. `certificate` is None in all but the first; `echoes` are empty where the step was
    never committed; `blocks` are openings one behind the other."""

    step: int
    segment: int
    first: int
    certificate: Signed | None = None
    commit_segment: int = 0
    echoes: bytes = b""
    blocks: bytes = b""

    def encode(self) -> bytes:
        given = self.certificate
        size = 0 if given is None else len(given.statement)
        parts = [_HEAD.pack(self.step, self.segment, self.first, size)]
        if given is not None:
            parts += [given.statement, given.signature]
            parts += [_COMMIT.pack(self.commit_segment, len(self.echoes)), self.echoes]
        return b"".join([*parts, self.blocks])

    @classmethod
    def decode(cls, body: bytes) -> Part:
        """Raises BadMessage unless the bytes are such a body."""
        try:
            step, segment, first, size = _HEAD.unpack_from(body)
            at = _HEAD.size
            if not size:
                return cls(step=step, segment=segment, first=first, blocks=body[at:])
            statement = body[at : at + size]
            at += size
            signature = body[at : at + SIGNATURE_BYTES]
            at += SIGNATURE_BYTES
            commit_segment, echo_bytes = _COMMIT.unpack_from(body, at)
            at += _COMMIT.size
        except struct.error:
            raise BadMessage(f"openings of {len(body)} bytes end in the middle") from None
        if size > MAX_STATEMENT_BYTES or len(body) < at + echo_bytes:
            raise BadMessage(f"openings of {len(body)} bytes end in the middle")
        return cls(
            step=step,
            segment=segment,
            first=first,
            certificate=Signed(statement=statement, signature=signature),
            commit_segment=commit_segment,
            echoes=body[at : at + echo_bytes],
            blocks=body[at + echo_bytes :],
        )


def certificate_part(step: int, segment: int, certificate: Signed) -> bytes:
    """The body that shows a certificate and nothing else."""
    return Part(step=step, segment=segment, first=0, certificate=certificate).encode()


def encode_openings(
    step: int, segment: int, evidence: Evidence, openings: Sequence[Opening]
) -> list[bytes]:
    """The bodies that show these openings, each within the limit of a control request."""
    bodies: list[bytes] = []
    rest = list(openings)
    while rest or not bodies:
        part = Part(step=step, segment=segment, first=len(openings) - len(rest))
        if not bodies:
            part = Part(
                step=step,
                segment=segment,
                first=0,
                certificate=evidence.certificate,
                commit_segment=evidence.commit_segment,
                echoes=evidence.echoes,
            )
        body = bytearray(part.encode())
        while rest and len(body) + len(rest[0].data) + len(rest[0].path) <= MAX_MESSAGE_BYTES:
            opening = rest.pop(0)
            body += opening.data + opening.path
        bodies.append(bytes(body))
    return bodies


def split_openings(blocks: bytes, nbytes: int, numbers: Sequence[int]) -> list[Opening]:
    """The openings of these blocks of a segment of `nbytes`, as far as `blocks` reaches. Raises
    BadMessage if it ends in the middle of one, or holds more."""
    opened, at = [], 0
    for number in numbers:
        if at == len(blocks):
            break
        data_end = at + block_bytes(nbytes, number)
        end = data_end + path_bytes(nbytes, number)
        if end > len(blocks):
            raise BadMessage(f"openings of {len(blocks)} bytes end in the middle of one")
        opened.append(Opening(data=blocks[at:data_end], path=blocks[data_end:end]))
        at = end
    if at != len(blocks):
        raise BadMessage(f"{len(blocks) - at} bytes behind the last opening")
    return opened
