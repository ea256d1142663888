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
from mapreduce.net.send_queue import MEASURE_S
from mapreduce.net.stream import FrameStream, Hello, serve_stream
from mapreduce.services.grants import job_keys
from mapreduce.wire.frames import FrameReader, Header
from mapreduce.wire.miner_session import MinerSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from mapreduce.wire.messages import Grant, SignedGrant

UNUSED_RESERVATION_S = 30.0  # a rank that has not come by then does not come any more
SILENCE_S = 60.0  # four missed PINGs of a peer: its path is dead
CHECK_S = 1.0  # how often a job looks at the clock

_log = logging.getLogger(__name__)


class MinerJob:
    """Serves one grant until its last peer has left, it expires, or it is closed.

    `sign` signs with the miner's hotkey; `on_end` is called once, when the memory of the job is
    free again.
    """

    def __init__(
        self,
        signed: SignedGrant,
        grant: Grant,
        segment: int,
        sign: Callable[[bytes], bytes],
        on_end: Callable[[MinerJob], None],
    ) -> None:
        self.grant = grant
        self.terms = grant.terms
        self.session = MinerSession(self.terms, segment, job_keys(signed, grant), sign)
        self.ended = False
        self._on_end = on_end
        self._streams: dict[int, FrameStream] = {}
        self._awaited = set(range(self.terms.peer_count))
        self._closing = False
        self._pump_due = False
        self._measuring: asyncio.TimerHandle | None = None
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
        if not self._pump_due:  # once for all frames that the loop finds in one go
            self._pump_due = True
            self._loop.call_soon(self._pump)

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
        """Reduces what has come and writes what the session has, to the peers whose sockets take
        it, until nothing moves. Like the peers, every miner begins its round with another one."""
        self._pump_due = False
        session, count = self.session, self.terms.peer_count
        session.reduce()
        moved = True
        while moved:
            moved = False
            for rank in sorted(session.ready, key=lambda r: (r - session.segment) % count):
                stream = self._streams.get(rank)
                while stream is not None and stream.writable:
                    pieces = session.next_output(rank)
                    if not pieces:
                        break
                    stream.write(*pieces)
                    moved = True
                    if stream.writable:
                        session.output_done(rank)
            if moved:
                session.reduce()  # the ring may have room again
        if session.busy and self._measuring is None:
            self._measure_queues()

    def _measure_queues(self) -> None:
        """While a step is under way: lets the send buffers follow what the links carry."""
        self._measuring = None
        now = time.perf_counter()
        for stream in self._streams.values():
            if stream.queue is not None:
                stream.queue.measure(now)
                if not self.session.busy:
                    stream.queue.rest()
        if self.session.busy:
            self._measuring = self._loop.call_later(MEASURE_S, self._measure_queues)

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
            if self._measuring is not None:
                self._measuring.cancel()
            self._on_end(self)
