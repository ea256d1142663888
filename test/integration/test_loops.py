"""Jobs on asyncio's loop and on uvloop: the same bytes, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import TYPE_CHECKING

import psutil
import pytest
import uvloop

from mapreduce.errors import MinerLost
from test.integration.fleet import (
    DEADLINE_S,
    Fleet,
    MinerNode,
    all_reduce_everywhere,
    errors_of,
    integers,
    tensors,
    until,
)

if TYPE_CHECKING:
    from mapreduce.services.peer_job import PeerJob

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_buffer_is_not_reused_while_a_transport_holds_it(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets that take little, and readers that stop: whoever reuses a buffer corrupts bytes."""
    held = 0

    async def stutter(job: PeerJob, node: MinerNode) -> None:
        nonlocal held
        streams = [job._streams[0], *node.miner.jobs[job.grant.job]._streams.values()]
        transports = [stream._transport for stream in streams]
        for stream, transport in zip(streams, transports, strict=True):
            assert transport is not None
            assert stream.queue is not None
            monkeypatch.setattr(stream.queue, "measure", lambda now: None)  # it sets the buffer
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        try:
            for turn in itertools.count():
                for transport in transports:
                    assert transport is not None
                    held = max(held, transport.get_write_buffer_size())
                    (transport.pause_reading if turn % 2 else transport.resume_reading)()
                await asyncio.sleep(0.002)
        finally:
            for transport in transports:
                assert transport is not None
                transport.resume_reading()

    async def run() -> None:
        async with Fleet(1, window_bytes=64 << 10, frame_bytes=32 << 10) as fleet:
            jobs = await fleet.open_jobs(2)
            slow = asyncio.create_task(stutter(jobs[0], fleet.miners[0]))
            for _ in range(2):
                await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
            slow.cancel()
            await asyncio.wait([slow])

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(run(), DEADLINE_S))
    assert held > 0


@pytest.mark.parametrize("loop", LOOPS)
def test_jobs_run_and_end_on_either_loop(loop: str) -> None:
    async def run() -> None:
        async with Fleet(3) as fleet:
            jobs = await fleet.open_jobs(2, miner_count=3)
            for count in (0, 1, 5_000, 1_000_003):
                await all_reduce_everywhere(jobs, tensors(jobs, count))
            await fleet.miners[2].runner.cleanup()
            for error in await errors_of(jobs):
                assert isinstance(error, MinerLost)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(run(), DEADLINE_S))


async def open_and_close(count: int) -> None:
    async with Fleet(1) as fleet:

        async def once() -> None:
            job = await fleet.open_job(0, 1)
            await all_reduce_everywhere([job], [integers(0, 100)])
            await job.close()

        def counts() -> tuple[int, int, int]:
            tasks = len(asyncio.all_tasks())
            return len(fleet.connections()), tasks, psutil.Process().num_fds()

        for _ in range(5):
            await once()
        await until(lambda: not fleet.miners[0].miner.jobs, "every job ends")
        before = counts()
        for _ in range(count):
            await once()

        def no_more() -> bool:
            return all(now <= then for now, then in zip(counts(), before, strict=True))

        await until(no_more, f"no trace of {count} streams is left")


@pytest.mark.parametrize("loop", LOOPS)
def test_streams_leave_no_trace(loop: str) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(open_and_close(100), DEADLINE_S))


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_thousand_streams_leave_no_trace(loop: str) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(open_and_close(1000), 100.0))
