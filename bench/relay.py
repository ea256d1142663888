"""A path with delay, in user space: a TCP relay that passes every byte on after a fixed time.

Used where the kernel cannot delay packets. It delays what the applications send; TCP itself, which
ends at the relay on both sides, still sees a short path. Each direction keeps order and holds at
most `WINDOW_BYTES`: like a path it does not take bytes faster than they can be passed on, for ever.
A connection that one side closes is closed on both: our streams know no half-open state.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from mapreduce.net.loop import new_event_loop
from mapreduce.processes import spawn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from bench.lab import Host

Route: TypeAlias = tuple[int, str, int]  # the port to listen on, the target's address and port

WINDOW_BYTES = 64 << 20
EARLY_S = 0.0005  # that much too early is in time: timers are not more precise
READY = "ready"
READY_TIMEOUT_S = 30.0


class Relay:
    """Relays `routes` on a host, in a process of its own; every byte arrives `delay_s` seconds
    after it was read, in both directions."""

    def __init__(self, host: Host, routes: Sequence[Route], delay_s: float) -> None:
        arguments = (host.ip, json.dumps(routes), f"{delay_s:g}")
        self._argv = [*host.prefix, sys.executable, "-m", "bench.relay", *arguments]

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="mapreduce-relay-")
        log = Path(self._directory.name, "relay.log")
        self._process = spawn("relay", self._argv, log_path=log)
        try:
            self._process.wait_ready(lambda: READY in log.read_text(), READY_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()
        self._directory.cleanup()


class _Leg(asyncio.Protocol):
    """One end of a relayed connection. What it reads, its twin writes later.

    Args:
        delay_s: how much later. target: where the twin dials; None if this is the twin.
    """

    def __init__(self, delay_s: float, target: tuple[str, int] | None = None) -> None:
        self._delay_s = delay_s
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._twin: _Leg | None = None
        self._held: deque[tuple[float, bytes | None]] = deque()
        self._held_bytes = 0
        self._timer: asyncio.Handle | None = None
        self._writable = False  # until it is connected
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses
        if self._target is not None:
            self._twin = _Leg(self._delay_s)
            self._twin._twin = self
            self._dialling = self._loop.create_task(self._dial(self._twin, *self._target))
        self.resume_writing()

    async def _dial(self, twin: _Leg, ip: str, port: int) -> None:
        try:
            await self._loop.create_connection(lambda: twin, ip, port)
        except OSError:
            if self._transport is not None:
                self._transport.close()

    def data_received(self, data: bytes) -> None:
        assert self._twin is not None
        assert self._transport is not None
        self._twin.hold(data)
        if self._twin._held_bytes > WINDOW_BYTES:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._twin is not None:
            self._twin.hold(None)

    def hold(self, data: bytes | None) -> None:
        """Writes the data when its time has come; None closes the connection then."""
        if self._transport is not None and self._transport.is_closing():
            return
        self._held.append((self._loop.time() + self._delay_s, data))
        self._held_bytes += len(data or b"")
        if self._timer is None and self._writable:
            self._timer = self._loop.call_later(self._delay_s, self._release)

    def _release(self) -> None:
        assert self._transport is not None
        self._timer = None
        due = self._loop.time() + EARLY_S
        while self._held and self._writable and self._held[0][0] <= due:
            _, data = self._held.popleft()
            if data is None:
                self._transport.close()
                return
            self._held_bytes -= len(data)
            self._transport.write(data)
        if self._twin is not None and self._held_bytes <= WINDOW_BYTES:
            self._twin._resume_reading()
        if self._held and self._writable:
            wait_s = max(0.0, self._held[0][0] - self._loop.time())
            self._timer = self._loop.call_later(wait_s, self._release)

    def _resume_reading(self) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing() and not transport.is_reading():
            transport.resume_reading()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if self._timer is None and self._held:
            self._timer = self._loop.call_soon(self._release)


async def _serve(ip: str, routes: Sequence[Route], delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    for port, target_ip, target_port in routes:
        await loop.create_server(partial(_Leg, delay_s, (target_ip, target_port)), ip, port)
    print(READY, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """The relay's process: ends by a signal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ip", help="where to listen")
    parser.add_argument("routes", type=json.loads, help="JSON: [[port, target ip, target port]]")
    parser.add_argument("delay_s", type=float, help="seconds, one way")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(options.ip, options.routes, options.delay_s))


if __name__ == "__main__":
    main()
