"""The binary frame: a fixed header, then `length` bytes. Knows how bytes become frames, not what
they mean.

Every frame of the bulk stream starts with 32 bytes, little-endian:

    magic  2s   b"MR"
    kind   u8   `Kind`
    flags  u8   `REPLY` on the answer to a PING, else 0
    epoch  u32  0; counts the restarts of a reassigned segment
    step   u32  1, 2, ... in the order in which a job issues collectives; 0 outside a step
    segment u16 index of the miner
    rank   u16  index of the peer (0-based)
    offset u64  bytes, within the segment
    length u32  bytes that follow
    zero   u32  0

The payload of DATA and RESULT goes straight to where it belongs: `FrameReader` asks for the memory,
and who answers checks the header against the grant first. All other bodies are bounded by
`MAX_BODY_BYTES` and collected here.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.errors import BadFrame

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BODY_BYTES = 64 * 1024
REPLY = 1

_MAGIC = b"MR"
_HEADER = struct.Struct("<2sBBIIHHQII")
HEADER_BYTES = _HEADER.size


class Kind(enum.IntEnum):
    """What a frame is; the comment says who sends it."""

    HELLO = 1  # peer, first: echoes the nonce of the 101 answer
    OPEN = 2  # peer: enters a step; miner, in a broadcast: the step as the root opened it
    DATA = 3  # peer: a run of whole blocks of its contribution
    CREDIT = 4  # miner: `offset` bytes of the segment are released, for who gets no RESULT
    CLOSE = 5  # peer: the segment's upload ends
    RESULT = 6  # miner: a run of whole reduced blocks; credit for as many bytes
    CERTIFICATE = 7  # miner: the segment is reduced, from these inputs to this output
    ACK = 8  # peer: holds the whole result of every segment
    COMMIT = 9  # miner: every rank has acknowledged
    ABORT = 10  # both: the step has failed on every rank
    PING = 11  # peer: keeps the path open; the miner's reply says whom the step waits for
    GOODBYE = 12  # both, last: why the stream ends
    RECEIPT = 13  # miner: has received what CLOSE says was sent
    REJECT = 14  # miner: has received other bytes than CLOSE says


_BULK = frozenset({Kind.DATA, Kind.RESULT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The fixed part of a frame. `offset` and `length` are bytes; `segment` and `rank` indexes from
    0."""

    kind: Kind
    step: int = 0
    segment: int = 0
    rank: int = 0
    offset: int = 0
    length: int = 0
    epoch: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            self.kind,
            self.flags,
            self.epoch,
            self.step,
            self.segment,
            self.rank,
            self.offset,
            self.length,
            0,
        )

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Header:
        """The header in `HEADER_BYTES` bytes. Raises BadFrame if they are none of this protocol."""
        magic, kind, flags, epoch, step, segment, rank, offset, length, zero = _HEADER.unpack(data)
        if magic != _MAGIC or zero != 0:
            raise BadFrame("the stream lost its framing: no frame starts here")
        try:
            kind = Kind(kind)
        except ValueError:
            raise BadFrame(f"unknown frame kind {kind}") from None
        if kind in _BULK and length == 0:
            raise BadFrame(f"{kind.name} of 0 bytes")
        if kind not in _BULK and length > MAX_BODY_BYTES:
            raise BadFrame(f"{kind.name} of {length} bytes: at most {MAX_BODY_BYTES} are allowed")
        return cls(
            kind=kind,
            flags=flags,
            epoch=epoch,
            step=step,
            segment=segment,
            rank=rank,
            offset=offset,
            length=length,
        )


def encode_frame(header: Header, body: bytes = b"") -> bytes:
    """A control frame as bytes; `header.length` must be the length of `body`."""
    assert header.length == len(body) <= MAX_BODY_BYTES
    return header.encode() + body


class FrameReader:
    """Cuts the bytes of one stream into frames without copying payloads.

    Used like `asyncio.BufferedProtocol`: write at most `len(view)` bytes into the view that
    `get_buffer()` returns, then tell `buffer_updated` how many. Raises BadFrame, after which the
    stream is unusable.

    Args:
        payload_buffer: called with the header of a DATA or RESULT frame and how many bytes of its
            payload have arrived; returns a non-empty view of at most the bytes still missing, or
            raises BadFrame if the header breaks the protocol. Called again while bytes are missing,
            so that a payload may go to several places.
        frame_received: called with the header of a whole frame and its body, which is empty for
            DATA and RESULT, and valid only during the call.
    """

    def __init__(
        self,
        payload_buffer: Callable[[Header, int], memoryview],
        frame_received: Callable[[Header, memoryview], None],
    ) -> None:
        self._payload_buffer = payload_buffer
        self._frame_received = frame_received
        self._header_view = memoryview(bytearray(HEADER_BYTES))
        self._body_view = memoryview(bytearray())
        self._header: Header | None = None
        self._received = 0  # bytes of the current part: the header, or what follows it

    def get_buffer(self) -> memoryview:
        header = self._header
        if header is None:
            return self._header_view[self._received :]
        if header.kind in _BULK:
            return self._payload_buffer(header, self._received)
        return self._body_view[self._received : header.length]

    def buffer_updated(self, nbytes: int) -> bool:
        """Takes note of bytes in the last buffer; returns whether they completed a frame."""
        self._received += nbytes
        header = self._header
        if header is None:
            if self._received < HEADER_BYTES:
                return False
            header = self._header = Header.decode(self._header_view)
            self._received = 0
            if header.kind not in _BULK and len(self._body_view) < header.length:
                self._body_view = memoryview(bytearray(header.length))
        if self._received < header.length:
            return False
        self._header = None
        self._received = 0
        bulk = header.kind in _BULK
        self._frame_received(header, self._body_view[: 0 if bulk else header.length])
        return True

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """The same for bytes that are already somewhere: copies them in."""
        view = memoryview(data)
        while view:
            buffer = self.get_buffer()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            self.buffer_updated(count)
            view = view[count:]
