"""How much of a stream the kernel may hold: measures what a socket carries, sets its send buffer.

A buffer that the kernel sizes itself grows to megabytes. Then a frame is "sent" long before it has
left, a peer's turns among its miners mean nothing, and every miner waits for the rank whose bytes
are last in the longest queue; on loopback the bytes also leave the processor's caches meanwhile.
Knows sockets and Linux's TCP_INFO; knows nothing of frames. Elsewhere nothing is measured and the
kernel's own sizes stay.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import TYPE_CHECKING

from mapreduce.wire.schedule import queue_bytes_for

if TYPE_CHECKING:
    import asyncio

MEASURE_S = 0.02  # how often a busy job measures
FORGET = 0.98  # of a rate per measurement: a smaller rate may be our own queue's doing
CHANGE = 1.25  # the buffer is left alone while it is within this factor of what it should be
MIN_SEGMENTS = 4  # fewer TCP segments than this make TCP wait for acknowledgements

# Linux: in struct tcp_info tcpi_snd_mss, tcpi_bytes_acked and tcpi_min_rtt (microseconds); and
# SO_BUF_LOCK (since 5.14), which with 0 gives the size of a buffer back to the kernel.
_TCP_INFO = struct.Struct("=16x I 100x Q 20x I")
_SO_BUF_LOCK = 72


class SendQueue:
    """The kernel's queue of one socket. `bytes_per_s` is what the path has carried of late, 0.0
    before anything was measured."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.bytes_per_s = 0.0
        self._socket = transport.get_extra_info("socket")
        self._limit = 0  # what the buffer was set to; 0: the kernel decides
        self._since: tuple[float, int] | None = None  # seconds, bytes acknowledged by then

    def rest(self) -> None:
        """Nothing is to be sent for a while: the time until the next `measure` is no rate."""
        self._since = None

    def measure(self, now: float) -> None:
        """Takes the rate since the last call, at `now` in seconds, and sets the buffer for it. A
        time in which nothing was carried, such as that until the last rank enters, tells nothing.
        """
        if sys.platform != "linux":
            return
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:  # closed meanwhile
            return
        if len(info) < _TCP_INFO.size:
            return
        mss, acked, round_trip_us = _TCP_INFO.unpack(info)
        since, self._since = self._since, (now, acked)
        if since is None or now <= since[0] or acked <= since[1]:
            return
        rate = (acked - since[1]) / (now - since[0])
        self.bytes_per_s = max(rate, FORGET * self.bytes_per_s)
        wanted = queue_bytes_for(self.bytes_per_s, round_trip_us * 1e-6)
        self._limit_to(max(wanted, MIN_SEGMENTS * mss))

    def _limit_to(self, nbytes: int) -> None:
        if self._limit and 1 / CHANGE < nbytes / self._limit < CHANGE:
            return
        self._limit = nbytes
        try:
            # Linux doubles what it is told, for its own overhead, and caps it at a system setting:
            # then it does better by itself.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes // 2)
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < nbytes // 2 * 2:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
        except OSError:  # closed meanwhile, or an older kernel
            return
