"""A link of a given rate: a TCP relay with one token bucket per direction, shared by all its
connections.

What is read counts, and nothing is read while the bucket is in debt: the sender's TCP feels a full
link. The kernel's buffers at the relay are small, for what they hold has been sent but not limited.
A connection that one side closes is closed on both: our streams know no half-open state.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from typing import TYPE_CHECKING, cast

from mapreduce.net.loop import new_event_loop
from test.limits.bucket import Bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

BURST_S = 0.002  # what an idle link saves up: of a step of a third of a second, it is nothing
LATE_S = 0.02  # what a busy one catches up: timers are late when all processors are busy
TURN_S = 0.004  # all connections together read so much at a time
KERNEL_S = 0.02  # what the kernel may hold of each connection
MIN_TURN_BYTES = 4096
MAX_TURN_BYTES = 1 << 18
MIN_KERNEL_BYTES = 1 << 15
SEGMENT_BYTES = 1448  # of Ethernet; loopback's 64 KiB fill the small buffers with two
READY = "ready"


class _Lane:
    """One direction of the link. `connections` is how many share it."""

    def __init__(self, bytes_per_s: float) -> None:
        self.connections = 0
        self._bucket = Bucket(
            bytes_per_s,
            burst_bytes=bytes_per_s * BURST_S,
            late_bytes=bytes_per_s * LATE_S,
            now=time.monotonic(),
        )
        self._waiting: list[_Leg] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def turn_bytes(self) -> int:
        """What a connection may read at a time."""
        share = self._bucket.bytes_per_s * TURN_S / max(1, self.connections)
        return int(min(max(share, MIN_TURN_BYTES), MAX_TURN_BYTES))

    def took(self, leg: _Leg, nbytes: int) -> bool:
        """The leg has read; whether it must wait now, until it is told to go on. Each of those that
        wait gets one turn before any of them gets another."""
        now = time.monotonic()
        self._bucket.take(nbytes, now)
        wait_s = self._bucket.wait_s(now)
        if wait_s > 0.0:
            self._waiting.append(leg)
            if self._timer is None:
                self._set_timer(wait_s)
        return wait_s > 0.0

    def _set_timer(self, wait_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        wait_s = self._bucket.wait_s(time.monotonic())
        if wait_s > 0.0:  # others have read meanwhile
            self._set_timer(wait_s)
            return
        waiting, self._waiting = self._waiting, []
        for leg in waiting:
            leg.go_on()


class _Leg(asyncio.BufferedProtocol):
    """One end of a connection: what it reads goes to its twin. One buffer is enough, for it reads
    no more until the twin's socket has taken all of it."""

    def __init__(self, lane: _Lane) -> None:
        self.twin: _Leg
        self._lane = lane
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(MAX_TURN_BYTES))
        self._unsent_bytes = 0  # read before there was a twin
        self._held = False  # by the lane
        self._blocked = True  # by the twin's socket, until it is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses
        self._transport.set_write_buffer_limits(high=0)
        self._lane.connections += 1
        self.resume_writing()
        self.twin._pass_on()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[: self._lane.turn_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        self._unsent_bytes = nbytes
        self._pass_on()
        self._held = self._lane.took(self, nbytes)
        self._read_or_not()

    def _pass_on(self) -> None:
        nbytes, twin = self._unsent_bytes, self.twin._transport
        if nbytes and twin is not None and not twin.is_closing():
            self._unsent_bytes = 0
            twin.write(self._buffer[:nbytes])

    def go_on(self) -> None:
        """The lane has room again."""
        self._held = False
        self._read_or_not()

    def pause_writing(self) -> None:
        self.twin._blocked = True
        self.twin._read_or_not()

    def resume_writing(self) -> None:
        self.twin._blocked = False
        self.twin._read_or_not()

    def _read_or_not(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._held or self._blocked:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lane.connections -= 1
        if self.twin._transport is not None:
            self.twin._transport.close()


class Link:
    """The link to one neuron, in both directions."""

    def __init__(self, target: tuple[str, int], bits_per_s: float) -> None:
        self._target = target
        self._to_target = _Lane(bits_per_s / 8)
        self._from_target = _Lane(bits_per_s / 8)
        self._kernel_bytes = max(MIN_KERNEL_BYTES, int(bits_per_s / 8 * KERNEL_S))

    async def serve(self, ip: str) -> None:
        """Listens on any free port, says which, and relays for ever."""
        loop = asyncio.get_running_loop()
        with self._socket() as listener:
            listener.bind((ip, 0))
            listener.listen(128)
            print(f"{READY} {listener.getsockname()[1]}", flush=True)
            async with asyncio.TaskGroup() as connecting:
                while True:
                    accepted, _ = await loop.sock_accept(listener)
                    connecting.create_task(self._connect(accepted))

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Before it listens or connects: accepted sockets inherit, and windows are agreed then.
        for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            made.setsockopt(socket.SOL_SOCKET, buffer, self._kernel_bytes // 2)  # Linux doubles it
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        return made

    async def _connect(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        dialled = self._socket()
        near, far = _Leg(self._to_target), _Leg(self._from_target)
        near.twin, far.twin = far, near
        try:
            await loop.sock_connect(dialled, self._target)
            await loop.create_connection(lambda: far, sock=dialled)
            await loop.connect_accepted_socket(lambda: near, accepted)
        except OSError:  # one of the two is not there, or no more
            accepted.close()
            dialled.close()


def main(argv: Sequence[str] | None = None) -> None:
    """The link's process: ends by a signal."""
    parser = argparse.ArgumentParser(prog="python -m test.limits", description=__doc__)
    parser.add_argument("ip", help="where to listen")
    parser.add_argument("target_ip")
    parser.add_argument("target_port", type=int)
    parser.add_argument("bits_per_s", type=float, help="in each direction")
    options = parser.parse_args(argv)
    link = Link((options.target_ip, options.target_port), options.bits_per_s)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(link.serve(options.ip))


if __name__ == "__main__":
    main()
