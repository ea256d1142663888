"""One job at a miner: its session, the streams of its peers, its lifetime.

Knows no routes and no validator's rules.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from mapreduce.errors import Refused
from mapreduce.net.stream import FrameStream, Hello, serve_stream
from mapreduce.wire.frames import FrameReader, Header
from mapreduce.wire.miner_session import MinerSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from mapreduce.wire.messages import Grant

UNUSED_RESERVATION_S = 30.0  # a rank that has not come by then does not come any more
SILENCE_S = 60.0  # four missed PINGs of a peer: its path is dead
CHECK_S = 1.0  # how often a job looks at the clock

_log = logging.getLogger(__name__)


class MinerJob:
    """Serves one grant until its last peer has left, it expires, or it is closed.

    `on_end` is called once, when the memory of the job is free again.
    """

    def __init__(self, grant: Grant, segment: int, on_end: Callable[[MinerJob], None]) -> None:
        self.grant = grant
        self.terms = grant.terms
        self.session = MinerSession(self.terms, segment)
        self.ended = False
        self._on_end = on_end
        self._streams: dict[int, FrameStream] = {}
        self._awaited = set(range(self.terms.peer_count))
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._reserved_at = self._loop.time()
        self._expires_at = grant.expires_at
        self._watch = self._loop.call_later(CHECK_S, self._check_time)

    def renew(self, grant: Grant) -> None:
        """Takes over a later end from a renewed grant of the same job."""
        self._expires_at = max(self._expires_at, grant.expires_at)

    def rank_of(self, session_key: str) -> int | None:
        """The index of the peer with this session key, None for a stranger."""
        keys = self.grant.session_keys
        return keys.index(session_key) if session_key in keys else None

    async def serve(self, request: web.Request, rank: int) -> None:
        """Upgrades the request to the stream of `rank` and serves it to its end.

        Raises Refused if the rank has had its stream already, or the job is over.
        """
        if self._closing:
            raise Refused("the job is over", code="no_such_job", status=404)
        if rank not in self._awaited:
            raise Refused(
                f"rank {rank + 1} has had its stream to this miner, or came later than "
                f"{UNUSED_RESERVATION_S:g} s after the grant",
                code="stream_taken",
            )
        if request.transport is None:
            raise ConnectionResetError("the peer has hung up")
        hello = Hello()

        def frame_received(header: Header, body: memoryview) -> None:
            if hello.said:
                self.session.frame_received(rank, header, body)
            else:
                hello.check(header, body)

        reader = FrameReader(partial(self.session.payload_buffer, rank), frame_received)
        stream = FrameStream(self, reader, rank)
        self.session.attach(rank)
        self._streams[rank] = stream
        self._awaited.discard(rank)
        await serve_stream(request, stream, hello)

    def close(self, reason: str) -> None:
        """Ends the job: every peer is told why and its stream is closed."""
        self._closing = True
        for stream in tuple(self._streams.values()):
            stream.close(reason)
        if not self._streams:
            self._end()

    # StreamOwner --------------------------------------------------------------------------------

    def stream_received(self, stream: FrameStream) -> None:
        self._pump()

    def stream_writable(self, stream: FrameStream) -> None:
        self.session.output_done(stream.index)
        self._pump()

    def stream_lost(self, stream: FrameStream, reason: str) -> None:
        rank = stream.index
        self._streams.pop(rank, None)
        self.session.detach(rank, reason)
        _log.info(
            "peer left",
            extra={"job": self.grant.job[:8], "rank": rank + 1, "reason": reason},
        )
        self._pump()
        # The last rank may still be on its way: it shall learn from its first step who has gone.
        if not self._streams and (self._closing or not self._awaited):
            self._end()

    def _pump(self) -> None:
        """Writes what the session has for the peers whose sockets take it, until nothing moves."""
        session = self.session
        moved = True
        while moved:
            moved = False
            for rank in tuple(session.ready):
                stream = self._streams.get(rank)
                while stream is not None and stream.writable:
                    piece = session.next_output(rank)
                    if piece is None:
                        break
                    stream.write(piece)
                    moved = True
                    if stream.writable:
                        session.output_done(rank)

    # Time ---------------------------------------------------------------------------------------

    def _check_time(self) -> None:
        now = self._loop.time()
        if time.time() > self._expires_at:
            self.close("the grant has expired")
        elif self._awaited and now - self._reserved_at > UNUSED_RESERVATION_S:
            self._stop_waiting()
        for stream in tuple(self._streams.values()):
            if now - stream.last_read > SILENCE_S:
                stream.fail(f"no sign of life for {SILENCE_S:g} s")
        if not self.ended:
            self._watch = self._loop.call_later(CHECK_S, self._check_time)

    def _stop_waiting(self) -> None:
        """Ranks that never came are lost, so that no other rank waits for them in a step."""
        for rank in tuple(self._awaited):
            self.session.detach(rank, f"it opened no stream in {UNUSED_RESERVATION_S:g} s")
        self._awaited.clear()
        self._pump()
        if not self._streams:
            self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._watch.cancel()
            self._on_end(self)
