"""A validator dials back, and the neuron that asked says plainly what it heard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from aiohttp import web

from mapreduce.local import LocalSubnet
from mapreduce.net.auth import new_session_key
from mapreduce.net.listener import listen
from mapreduce.processes import free_port
from mapreduce.services import dial
from mapreduce.services.dial import watch_reach
from test.integration.fleet import Fleet, in_loop, new_hotkey, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest
    from bittensor.sp_core import Keypair

PATH = "/v1/dial"


def move(fleet: Fleet, key: Keypair, port: int | None) -> None:
    """The chain shows another port for this hotkey."""
    neurons = fleet.directory.neurons
    for index, neuron in enumerate(neurons):
        if neuron.hotkey == key.ss58_address:
            neurons[index] = replace(neuron, ip=None if port is None else "127.0.0.1", port=port)


async def dialled(fleet: Fleet, key: Keypair) -> tuple[bool, str]:
    """What the validator finds, as if it had not dialled lately."""
    fleet.dial_back._dialled_at.clear()
    status, answer = await fleet.request(key, fleet.validator, "POST", PATH)
    assert status == 200, answer
    assert answer["ip"] == "127.0.0.1"
    assert answer["seen_from"] == "127.0.0.1"
    return answer["reached"], answer["reason"]


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[int]:
    """A web server that is no neuron; yields its port."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.SockSite(runner, listen("127.0.0.1", 0)).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@in_loop
async def test_what_the_validator_finds_at_the_published_address() -> None:
    async with Fleet(2) as fleet, stranger() as foreign_port:
        miner, other = fleet.miners
        assert await dialled(fleet, miner.key) == (True, "")
        for port, reason in (
            (free_port(), "cannot be reached"),
            (other.remote.port, "a neuron with another hotkey"),
            (foreign_port, "HTTP status 404 from no neuron of ours"),
        ):
            move(fleet, miner.key, port)
            reached, said = await dialled(fleet, miner.key)
            assert not reached
            assert reason in said
        # A validator has no such route, and is reached all the same.
        second = new_hotkey()
        fleet.directory.add(second.ss58_address, fleet.validator.port, permit=True)
        reached, said = await dialled(fleet, second)
        assert not reached  # the first validator's hotkey answers there
        move(fleet, fleet.validator_key, fleet.validator.port)
        assert await dialled(fleet, fleet.validator_key) == (True, "")


@in_loop
async def test_who_may_ask_and_how_often() -> None:
    async with Fleet(1) as fleet:
        ask = (fleet.validator, "POST", PATH)
        status, code, _ = await fleet.refusal(new_hotkey(), *ask)
        assert (status, code) == (403, "not_registered")
        status, code, _ = await fleet.refusal(new_session_key(), *ask)
        assert (status, code) == (403, "not_registered")
        key = fleet.miners[0].key
        assert await dialled(fleet, key) == (True, "")
        status, code, text = await fleet.refusal(key, *ask)
        assert (status, code) == (409, "too_often")
        assert "ask again in " in text
        move(fleet, key, None)
        status, code, _ = await fleet.refusal(key, *ask)
        assert (status, code) == (409, "no_axon")


def reachable(caplog: pytest.LogCaptureFixture) -> int:
    """How often the log says that all is well."""
    return [record.message for record in caplog.records].count("reachable as advertised")


@in_loop
async def test_the_log_says_it_and_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("FIRST_S", 0.0), ("UNREACHABLE_S", 0.05), ("EVERY_S", 0.05)):
        monkeypatch.setattr(dial, name, seconds)
    monkeypatch.setattr(dial, "AGAIN_S", 0.0)
    caplog.set_level(logging.INFO, "mapreduce.services.dial")
    async with Fleet(1) as fleet:
        move(fleet, fleet.validator_key, fleet.validator.port)
        miner = fleet.miners[0]
        closed = free_port()
        move(fleet, miner.key, closed)
        watching = asyncio.create_task(
            watch_reach(miner.key, fleet.directory, fleet.http, "here")  # type: ignore[arg-type]
        )
        try:
            line = f"unreachable as advertised: validator uid 0 cannot reach 127.0.0.1:{closed}"
            await until(lambda: line in caplog.text, "it is said")
            assert "it sees this host as 127.0.0.1" in caplog.text
            assert "--axon.external_ip and --axon.external_port" in caplog.text
            move(fleet, miner.key, miner.remote.port)
            await until(lambda: reachable(caplog), "it is over")
            await asyncio.sleep(0.3)
            assert reachable(caplog) == 1  # told once, not every time
            # A validator that does not answer says nothing.
            await fleet.stop_coordinator()
            before = len(caplog.records)
            await asyncio.sleep(0.3)
            assert [r.message for r in caplog.records[before:] if r.levelno >= logging.INFO] == []
        finally:
            watching.cancel()


def test_a_miner_learns_it_from_its_validator(tmp_path: Path) -> None:
    with LocalSubnet(miners=1, directory=tmp_path) as subnet:
        log = tmp_path / "miner-1.log"
        asyncio.run(until(lambda: "reachable as advertised" in log.read_text(), "said", 30.0))
        subnet.check()
