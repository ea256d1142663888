"""A neuron's end of the channel to its supervisor, and what draining means for each part of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce import __version__
from mapreduce.errors import JobRefused
from mapreduce.services.worker import VARIABLE, Worker, supervised
from test.integration.fleet import Fleet, all_reduce_everywhere, in_loop, until
from test.integration.test_join import integers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Work:
    """A duty that has so many things under way."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.draining = False

    def under_way(self) -> str | None:
        return f"{self.count} things" if self.count else None


class Ends:
    """Both ends of a channel: a worker that obeys, and what it says."""

    def __init__(self, duty: Work, ours: socket.socket) -> None:
        self.duty = duty
        self.stopped = asyncio.Event()
        self.ours = ours

    async def hear(self) -> dict[str, Any]:
        """The next message of the worker."""
        line = await asyncio.wait_for(self.reader.readline(), 5.0)
        message: dict[str, Any] = json.loads(line)
        return message

    def say(self, line: bytes) -> None:
        """Says something to the worker."""
        self.writer.write(line + b"\n")


@contextlib.asynccontextmanager
async def channel(work: int = 0, state: Path | None = None) -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    environ = {VARIABLE: str(theirs.detach())}
    worker = Worker.from_environment(environ)
    assert worker is not None
    assert worker.listener is None
    assert environ == {}  # no child of ours believes that it is its own
    ends = Ends(Work(work), ours)
    ends.reader, ends.writer = await asyncio.open_unix_connection(sock=ours)
    async with supervised(worker, [ends.duty], ends.stopped.set, state):
        yield ends
    ends.writer.close()


@in_loop
async def test_ready_is_said_with_version_and_state(tmp_path: Path) -> None:
    async with channel(state=tmp_path / "a state") as ends:
        assert await ends.hear() == {
            "event": "ready",
            "version": __version__,
            "state": str(tmp_path / "a state"),
        }
    async with channel() as ends:
        assert (await ends.hear())["state"] is None


@in_loop
async def test_draining_takes_on_nothing_and_tells_what_is_left() -> None:
    async with channel(work=2) as ends:
        await ends.hear()
        ends.say(b'{"command": "drain"}')
        assert await ends.hear() == {"event": "busy", "work": "2 things"}
        assert ends.duty.draining
        ends.duty.count = 1
        assert await ends.hear() == {"event": "busy", "work": "1 things"}
        ends.say(b'{"command": "resume"}')
        await until(lambda: not ends.duty.draining, "it goes on")
        ends.duty.count = 0
        ends.say(b'{"command": "drain"}')
        assert await ends.hear() == {"event": "drained"}


@in_loop
async def test_words_of_a_newer_supervisor_are_passed_over() -> None:
    async with channel() as ends:
        await ends.hear()
        for line in (b'{"command": "sing"}', b"{}", b'{"command": 7, "more": []}'):
            ends.say(line)
        ends.say(b'{"command": "drain"}')
        assert await ends.hear() == {"event": "drained"}
        assert not ends.stopped.is_set()


@pytest.mark.parametrize("line", [None, b"no json", b"x" * 200_000])
def test_without_its_supervisor_a_neuron_stops(line: bytes | None) -> None:
    async def scenario() -> None:
        async with channel() as ends:
            await ends.hear()
            if line is None:
                ends.writer.close()
            else:
                ends.say(line)
            await asyncio.wait_for(ends.stopped.wait(), 5.0)

    asyncio.run(scenario())


@in_loop
async def test_without_a_variable_there_is_no_supervisor() -> None:
    assert Worker.from_environment({}) is None
    async with supervised(None, [], lambda: None, None):
        pass


def test_the_listening_socket_comes_with_it() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    ours, theirs = socket.socketpair()
    worker = Worker.from_environment({VARIABLE: f"{theirs.detach()} {listener.detach()}"})
    assert worker is not None
    assert worker.listener is not None
    assert worker.listener.getsockname() == address
    worker.listener.close()
    ours.close()
    assert VARIABLE not in os.environ


# The parts ----------------------------------------------------------------------------------------


@in_loop
async def test_a_miner_that_drains_takes_no_job_and_goes_on_with_the_one_it_has() -> None:
    async with Fleet(2) as fleet:
        first, second = fleet.miners
        second.miner.draining = True
        jobs = await fleet.open_jobs(2, miner_count=1)
        assert [miner.hotkey for miner in jobs[0].grant.miners] == [first.key.ss58_address]
        assert first.miner.under_way() == "1 job"
        first.miner.draining = True
        await all_reduce_everywhere(jobs, [integers(rank, 1000) for rank in range(2)])
        with pytest.raises(
            JobRefused, match="it takes no jobs yet: it is starting, or will be updated"
        ):
            await fleet.open_job(0, 1)
        await asyncio.gather(*(job.close() for job in jobs))
        await until(lambda: first.miner.under_way() is None, "it is drained")
        second.miner.draining = False
        (job,) = await fleet.open_jobs(1)
        assert [miner.hotkey for miner in job.grant.miners] == [second.key.ss58_address]


@in_loop
async def test_a_validator_that_drains_begins_no_benchmark() -> None:
    async with Fleet(1) as fleet:
        await fleet.add_bots(1)
        port = fleet.validator.port
        await fleet.stop_coordinator()
        await fleet.start_coordinator(port)
        fleet.benchmarks.draining = True
        gathering = asyncio.create_task(fleet.benchmarks.gather())
        await until(lambda: fleet.benchmarks._free, "the bot has asked")
        await asyncio.sleep(0.3)
        assert not gathering.done()
        assert fleet.benchmarks.under_way() is None
        fleet.benchmarks.draining = False
        fleet.benchmarks._asked.set()  # as when a bot asks again
        assert await asyncio.wait_for(gathering, 5.0) == list(fleet.bots)
