"""The send buffer of a real socket follows what the socket has carried."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from mapreduce.net.send_queue import FORGET, MIN_SEGMENTS, SendQueue
from mapreduce.wire.schedule import queue_bytes_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

if sys.platform != "linux":
    pytest.skip("only Linux tells what a socket has carried", allow_module_level=True)

MB = 1_000_000


class Pipe:
    """A connection over loopback whose other end reads everything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.socket: socket.socket = writer.get_extra_info("socket")
        self.queue = SendQueue(writer.transport)

    async def carry(self, nbytes: int) -> None:
        """Sends so many bytes, and returns when the other side's TCP has acknowledged them."""
        self.writer.write(bytes(nbytes) + b"\n")
        await self.reader.readline()  # the other side answers when it has them all

    @property
    def send_buffer(self) -> int:
        return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@contextlib.asynccontextmanager
async def pipe() -> AsyncIterator[Pipe]:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(MB):
            if data.endswith(b"\n"):
                writer.write(b"\n")
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        ours = Pipe(*await asyncio.open_connection("127.0.0.1", port))
        yield ours
        ours.writer.close()
        await ours.writer.wait_closed()


def test_a_rate_is_what_was_acknowledged_between_two_measurements() -> None:
    async def run() -> None:
        async with pipe() as ours:
            ours.queue.measure(10.0)
            assert ours.queue.bytes_per_s == 0.0
            await ours.carry(4 * MB)
            ours.queue.measure(10.5)
            assert ours.queue.bytes_per_s == pytest.approx(8 * MB, rel=0.05)
            ours.queue.measure(11.0)  # nothing was sent, so that tells nothing
            assert ours.queue.bytes_per_s == pytest.approx(8 * MB, rel=0.05)
            await ours.carry(1000)
            ours.queue.measure(12.0)  # less was: that may have been our own queue's doing
            assert ours.queue.bytes_per_s == pytest.approx(FORGET * 8 * MB, rel=0.05)
            ours.queue.rest()
            await ours.carry(4 * MB)
            ours.queue.measure(12.001)  # without the rest: 4 GB/s
            assert ours.queue.bytes_per_s < 8 * MB

    asyncio.run(run())


def test_the_buffer_holds_what_the_rate_needs_and_some_segments_at_least() -> None:
    async def run() -> None:
        async with pipe() as ours:
            mss = ours.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            ours.queue.measure(0.0)
            await ours.carry(MB)
            ours.queue.measure(1.0)
            # A few segments, where 2 ms of a slow flow are less: else TCP waits for itself.
            assert queue_bytes_for(ours.queue.bytes_per_s, 0.0) < MIN_SEGMENTS * mss
            assert MIN_SEGMENTS * mss <= ours.send_buffer <= 4 * MIN_SEGMENTS * mss
            await ours.carry(MB)
            ours.queue.measure(1.0 + MB / 1e9)
            least = queue_bytes_for(ours.queue.bytes_per_s, 0.0)
            assert least > MIN_SEGMENTS * mss
            assert least * 0.8 <= ours.send_buffer < 3 * least

    asyncio.run(run())


def test_where_the_system_caps_the_buffer_the_kernel_decides() -> None:
    async def run() -> None:
        async with pipe() as ours:
            ours.queue.measure(0.0)
            await ours.carry(MB)
            ours.queue.measure(1e-6)  # a petabyte per second
            locks = ours.socket.getsockopt(socket.SOL_SOCKET, 72)  # SO_BUF_LOCK
            assert locks & 1 == 0

    asyncio.run(run())


def test_a_closed_socket_measures_nothing() -> None:
    async def run() -> None:
        async with pipe() as ours:
            ours.queue.measure(0.0)
        ours.queue.measure(1.0)
        assert ours.queue.bytes_per_s == 0.0

    asyncio.run(run())
