"""The bulk stream: a transport taken over from aiohttp after an HTTP Upgrade. Knows bytes and
readiness, no protocol.

The peer sends a signed `GET .../stream` with `Upgrade: mapreduce/1`; the miner answers `101` with a
nonce; the peer's first frame, HELLO, echoes it. Bytes sent right behind the request head would be
lost in the HTTP parser, so the peer sends nothing before it has read the 101, and the miner never
speaks first.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from typing import TYPE_CHECKING, Protocol, cast

import aiohttp
from aiohttp import web

from mapreduce.errors import BadFrame, Unavailable
from mapreduce.net.client import Remote, raise_refusal
from mapreduce.net.send_queue import SendQueue
from mapreduce.wire.bodies import NONCE_BYTES, encode_text
from mapreduce.wire.frames import FrameReader, Header, Kind, encode_frame
from mapreduce.wire.messages import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

UPGRADE = "mapreduce/1"
NONCE_HEADER = "X-Mapreduce-Nonce"
HELLO_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0  # for the last bytes, before the connection is cut

_log = logging.getLogger(__name__)


class StreamOwner(Protocol):
    """What a stream calls, always from the event loop and never from inside `write`."""

    def stream_received(self, stream: FrameStream) -> None:
        """A frame has come."""
        ...

    def stream_writable(self, stream: FrameStream) -> None:
        """Everything written has left: the buffers that `write` was given are free again."""
        ...

    def stream_lost(self, stream: FrameStream, reason: str) -> None:
        """The stream is over, once and for all."""
        ...


class FrameStream(asyncio.BufferedProtocol):
    """One stream's protocol. `index` is whatever its owner knows it by.

    `write` is called only while `writable`: then the transport holds no bytes of ours, and a buffer
    is free again as soon as the stream is writable again. uvloop keeps views of what the socket did
    not take at once, asyncio copies it (and Python 3.11's joins the pieces before); both let go of
    it before they call `resume_writing`. `queue` is what the kernel holds, once the stream is open.
    """

    def __init__(self, owner: StreamOwner, reader: FrameReader, index: int) -> None:
        self.index = index
        self.writable = False
        self.last_read = 0.0  # loop time
        self._owner = owner
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self.queue: SendQueue | None = None
        self._replaced: asyncio.BaseProtocol | None = None
        self._waste = memoryview(bytearray(4096))
        self._failure: str | None = None
        self._closing = False
        self._lost = False
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def take_over(
        self, transport: asyncio.Transport, replaced: asyncio.BaseProtocol | None
    ) -> None:
        """Reads and writes this transport from now on; `replaced`, aiohttp's protocol, hears of its
        end."""
        self._replaced = replaced
        transport.set_protocol(self)
        self.connection_made(transport)
        transport.resume_reading()  # aiohttp pauses while its handler runs

    def write(self, *pieces: bytes | memoryview) -> None:
        """Sends pieces in one go; `writable` tells whether all have left already."""
        assert self._transport is not None
        self._transport.writelines(pieces)
        self.writable = self._transport.get_write_buffer_size() == 0

    def close(self, reason: str) -> None:
        """Ends the stream in good order: what was written still leaves, then GOODBYE."""
        transport = self._transport
        self._closing = True
        self.writable = False  # a transport that closes drops what is written to it
        if transport is None or transport.is_closing():
            return
        body = encode_text(reason)
        transport.write(encode_frame(Header(kind=Kind.GOODBYE, length=len(body)), body))
        transport.close()
        self._loop.call_later(CLOSE_TIMEOUT_S, transport.abort)

    def fail(self, reason: str) -> None:
        """Cuts the stream at once; the owner hears the reason."""
        if self._failure is None:
            self._failure = reason
        self.writable = False
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, error: BadFrame) -> None:
        """The other side has broken the protocol: it is told, and read no further."""
        self._failure = str(error)
        self.close(f"protocol violation: {error}")

    # asyncio.BufferedProtocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Pause at the first byte that the socket does not take, resume when the last one has left.
        self._transport.set_write_buffer_limits(high=0)
        self.queue = SendQueue(self._transport)
        self.writable = True
        self.last_read = self._loop.time()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._failure is None:
            try:
                return self._reader.get_buffer()
            except BadFrame as error:
                self._refuse(error)
        return self._waste

    def buffer_updated(self, nbytes: int) -> None:
        if self._failure is not None:
            return
        self.last_read = self._loop.time()
        try:
            complete = self._reader.buffer_updated(nbytes)
        except BadFrame as error:
            self._refuse(error)
            return
        if complete:
            self._owner.stream_received(self)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        if self._failure is None and not self._closing and not self._lost:
            self.writable = True
            self._owner.stream_writable(self)

    def eof_received(self) -> bool:
        return False  # no half-open streams: TLS has none

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self.writable = False
        reason = self._failure or (str(exc) if exc else "") or "the connection was closed"
        if self._replaced is not None:
            # Else aiohttp's connection table keeps the entry for ever.
            self._replaced.connection_lost(exc)
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.stream_lost(self, reason)


async def connect_stream(
    http: aiohttp.ClientSession,
    remote: Remote,
    path: str,
    headers: Mapping[str, str],
    stream: FrameStream,
) -> aiohttp.ClientResponse:
    """Opens a stream to a miner and says HELLO. The caller closes the response when the stream is
    over.

    Raises Unavailable if the miner cannot be reached, Refused if it says no.
    """
    upgrade = {"Connection": "Upgrade", "Upgrade": UPGRADE}
    try:
        response = await http.get(
            remote.url(path), headers={**headers, **upgrade}, allow_redirects=False
        )
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{remote} cannot be reached: {error or type(error).__name__}") from None
    connection = response.connection
    if response.status != 101 or connection is None or connection.transport is None:
        body = await response.content.read(MAX_MESSAGE_BYTES)
        response.close()
        raise_refusal(remote, response.status, body)
    assert connection is not None
    transport = cast("asyncio.Transport", connection.transport)
    try:
        nonce = bytes.fromhex(response.headers.get(NONCE_HEADER, ""))
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        response.close()
        raise Unavailable(f"{remote} upgraded the connection without a nonce")
    stream.take_over(transport, connection.protocol)
    stream.write(encode_frame(Header(kind=Kind.HELLO, length=NONCE_BYTES), nonce))
    return response


def is_upgrade(request: web.Request) -> bool:
    """Whether the request asks for our stream."""
    return request.headers.get("Upgrade", "").lower() == UPGRADE


async def serve_stream(request: web.Request, stream: FrameStream, hello: Hello) -> None:
    """Answers 101, hands the connection to `stream`, and returns when the stream is over.

    Always ends in ConnectionResetError, which tells aiohttp that there is nothing left to answer
    on.
    """
    transport = cast("asyncio.Transport", request.transport)
    stream.take_over(transport, request.protocol)
    head = (
        "HTTP/1.1 101 Switching Protocols\r\n"
        f"Connection: Upgrade\r\nUpgrade: {UPGRADE}\r\n{NONCE_HEADER}: {hello.nonce.hex()}\r\n\r\n"
    )
    stream.write(head.encode())
    loop = asyncio.get_running_loop()
    deadline = loop.call_later(HELLO_TIMEOUT_S, hello.check_said, stream)
    try:
        await asyncio.shield(stream.closed)
    finally:
        deadline.cancel()
        if not stream.closed.done():
            stream.fail("the miner is shutting down")
    raise ConnectionResetError("the stream is over")


class Hello:
    """The first frame on a stream: proves that the peer has read the 101 before it spoke."""

    def __init__(self) -> None:
        self.nonce = os.urandom(NONCE_BYTES)
        self.said = False

    def check(self, header: Header, body: memoryview) -> None:
        """Takes the first frame. Raises BadFrame unless it echoes the nonce."""
        if header.kind is not Kind.HELLO or not hmac.compare_digest(bytes(body), self.nonce):
            raise BadFrame("the stream does not begin with HELLO and this connection's nonce")
        self.said = True

    def check_said(self, stream: FrameStream) -> None:
        """Cuts a stream on which nobody has spoken in time."""
        if not self.said:
            stream.fail(f"no HELLO in {HELLO_TIMEOUT_S:g} s")
