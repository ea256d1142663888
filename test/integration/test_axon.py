"""The axon on the chain is kept right: a chain with the real one's limit, real look-ups."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from mapreduce.chain.actions import register_hotkey
from mapreduce.chain.axons import read_axon, serve_axon
from mapreduce.chain.embedded import create_chain
from mapreduce.config import AxonConfig, ChainConfig
from mapreduce.errors import ConfigError, NotRegistered, Unavailable
from mapreduce.net.auth import Verifier
from mapreduce.net.listener import listen
from mapreduce.net.server import make_app
from mapreduce.services import axon as axon_module
from mapreduce.services.axon import AxonUpkeep, look_up
from mapreduce.services.neuron import Neuron
from test.integration.fleet import in_loop, until
from test.unit.test_chain_support import (
    NETUID,
    Keys,
    isolated,  # noqa: F401
    keys,
    opened,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import bittensor as bt

BLOCK_S = 0.02  # the strict chain's 50 blocks between two servings are one second
PUBLIC = AxonConfig(external_ip="10.0.0.1")


class Told:
    """What would be shown as the reason for not being ready."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []

    def __call__(self, reason: str | None) -> None:
        self.reasons.append(reason)


@contextlib.asynccontextmanager
async def chain(path: Path, **parameters: Any) -> AsyncIterator[tuple[bt.Client, Keys]]:
    """A strict chain with one registered hotkey."""
    create_chain(path / "chain.sqlite", block_time_s=BLOCK_S, strict=True, **parameters)
    async with opened(path / "chain.sqlite") as client:
        wallet = keys("one")
        await register_hotkey(client, wallet, NETUID)
        yield client, wallet


def upkeep(client: bt.Client, wallet: Keys, config: AxonConfig, told: Told) -> AxonUpkeep:
    return AxonUpkeep(
        client,
        wallet,  # type: ignore[arg-type]
        NETUID,
        config,
        8091,
        one_machine=False,
        register_hint="do this",
        tell=told,
    )


async def shown(client: bt.Client, wallet: Keys) -> tuple[str, int] | None:
    return (await read_axon(client, NETUID, wallet.hotkey.ss58_address)).shown


async def until_shown(client: bt.Client, wallet: Keys, endpoint: tuple[str, int]) -> None:
    for _ in range(400):
        if await shown(client, wallet) == endpoint:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the chain does not show {endpoint}")


@in_loop
async def test_an_axon_is_published_once_and_then_as_the_limit_allows(tmp_path: Path) -> None:
    async with chain(tmp_path) as (client, wallet):
        told = Told()
        address = await upkeep(client, wallet, PUBLIC, told).publish()
        assert str(address) == "10.0.0.1:8091"
        assert await shown(client, wallet) == ("10.0.0.1", 8091)
        before = (await read_axon(client, NETUID, wallet.hotkey.ss58_address)).wait_blocks
        await upkeep(client, wallet, PUBLIC, told).publish()  # a restart
        after = (await read_axon(client, NETUID, wallet.hotkey.ss58_address)).wait_blocks
        assert after <= before  # was not published again
        assert told.reasons == []
        moved = AxonConfig(external_ip="2001:db8::7", external_port=9000)
        await upkeep(client, wallet, moved, told).publish()
        assert await shown(client, wallet) == ("2001:db8::7", 9000)
        assert "blocks for the chain's limit" in str(told.reasons[0])


@in_loop
async def test_what_another_process_has_published_is_mended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(axon_module, "LOOK_S", 0.1)
    monkeypatch.setattr(axon_module, "TELL_AGAIN_S", 0.0)
    caplog.set_level(logging.INFO, "mapreduce")
    async with chain(tmp_path) as (client, wallet):
        told = Told()
        kept = upkeep(client, wallet, PUBLIC, told)
        await kept.publish()
        task = asyncio.create_task(kept.keep())
        try:
            for _ in range(2):
                await asyncio.sleep(50 * BLOCK_S)
                await serve_axon(client, wallet, NETUID, "10.9.9.9", 1)
                assert await shown(client, wallet) == ("10.9.9.9", 1)
                await until_shown(client, wallet, ("10.0.0.1", 8091))
        finally:
            task.cancel()
        assert "the chain shows 10.9.9.9:1 for this hotkey, not 10.0.0.1:8091" in caplog.text
        assert "another process seems to run with this hotkey" in caplog.text
        assert "blocks for the chain's limit" in next(filter(None, told.reasons))
        assert told.reasons[-1] is None


@in_loop
async def test_the_address_of_another_process_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(axon_module, "LOOK_S", 0.1)
    async with chain(tmp_path) as (client, wallet):
        await serve_axon(client, wallet, NETUID, "10.0.0.5", 8091)
        kept = upkeep(client, wallet, AxonConfig(), Told())  # by what the chain shows
        assert (await kept.publish()).ip == "10.0.0.5"
        await asyncio.sleep(50 * BLOCK_S)
        await serve_axon(client, wallet, NETUID, "10.9.9.9", 1)
        task = asyncio.create_task(kept.keep())
        try:
            await until_shown(client, wallet, ("10.0.0.5", 8091))
        finally:
            task.cancel()


@in_loop
async def test_a_hotkey_that_lost_its_place_is_told_how_to_get_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(axon_module, "LOOK_S", 0.1)
    parameters = {"max_uids": 1, "hyperparameters": {"immunity_period": 0}}
    async with chain(tmp_path, **parameters) as (client, wallet):
        told = Told()
        kept = upkeep(client, wallet, PUBLIC, told)
        await kept.publish()
        task = asyncio.create_task(kept.keep())
        try:
            await register_hotkey(client, keys("two"), NETUID)
            await until(lambda: told.reasons, "it is told")
            assert "not registered on netuid 10 any more" in str(told.reasons[0])
            assert "`do this`" in caplog.text
            with pytest.raises(NotRegistered, match="`do this`"):
                await upkeep(client, wallet, PUBLIC, told).publish()
        finally:
            task.cancel()


class Work:
    """A part of a neuron that would take on work."""

    draining = False

    def under_way(self) -> str | None:
        """Nothing."""
        return None


@in_loop
async def test_a_neuron_takes_no_work_before_its_address_is_published(tmp_path: Path) -> None:
    async with chain(tmp_path) as (client, wallet):
        await serve_axon(client, wallet, NETUID, "10.0.0.1", 1)  # so that the chain makes it wait
        config = ChainConfig(network=f"embedded:{tmp_path / 'chain.sqlite'}", netuid=NETUID)
        neuron = Neuron(client, config, NamedKeys(wallet.coldkey, wallet.hotkey), "miner")  # type: ignore[arg-type]
        neuron.duties.append(work := Work())
        app = make_app(Verifier(neuron.hotkey), neuron.not_ready)
        axon = AxonConfig(ip="127.0.0.2", port=0)
        serving = asyncio.create_task(neuron.serve(app, axon, 0))
        await until(lambda: "blocks for the chain's limit" in str(neuron.not_ready()), "it waits")
        assert work.draining
        await until(lambda: neuron.not_ready() is None, "it is ready", 20.0)
        assert not work.draining
        signal.raise_signal(signal.SIGTERM)
        await serving
        assert neuron.not_ready() == "stopping"


@dataclass(frozen=True)
class NamedKeys(Keys):
    """Keys with the names that a wallet has, for the hint how to register."""

    name: str = "cold"
    hotkey_str: str = "hot"
    path: str = ""


# Look-ups -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def service(*answers: tuple[int, bytes]) -> AsyncIterator[str]:
    """Answers in turn, the last one for ever; yields its URL."""
    left = list(answers)

    async def answer(_: web.Request) -> web.Response:
        status, body = left.pop(0) if len(left) > 1 else left[0]
        headers = {"Location": "/"} if status == 302 else {}
        return web.Response(status=status, body=body, headers=headers)

    app = web.Application()
    app.router.add_get("/ip", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.SockSite(runner, listen("127.0.0.1", 0))
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/ip"
    finally:
        await runner.cleanup()


@in_loop
async def test_the_address_is_looked_up_where_the_operator_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(axon_module, "LOOK_S", 0.1)
    monkeypatch.setattr(axon_module, "LOOK_UP_S", 0.0)
    async with chain(tmp_path) as (client, wallet):
        async with service((200, b"10.1.2.3\n"), (500, b""), (200, b"10.1.2.4")) as url:
            kept = upkeep(client, wallet, AxonConfig(lookup_url=url), Told())
            address = await kept.publish()
            assert (str(address), address.source) == ("10.1.2.3:8091", "axon.lookup_url")
            task = asyncio.create_task(kept.keep())
            await until_shown(client, wallet, ("10.1.2.4", 8091))
            task.cancel()
        # The address from before was kept where the service failed.
        assert any("status 500" in getattr(r, "error", "") for r in caplog.records)
        assert "the address has changed" in caplog.text
        assert "10.1.2.3, which only a private network can dial" in caplog.text
        # The service is gone: the chain knows the address from the last time.
        again = await upkeep(client, wallet, AxonConfig(lookup_url=url), Told()).publish()
        assert (str(again), again.source) == ("10.1.2.4:8091", "the chain shows it")
        assert "the address cannot be looked up" in caplog.text


@in_loop
async def test_without_any_source_the_start_fails_with_both_flags(tmp_path: Path) -> None:
    async with chain(tmp_path) as (client, wallet), service((503, b"")) as url:
        kept = upkeep(client, wallet, AxonConfig(lookup_url=url), Told())
        with pytest.raises(ConfigError, match=r"axon\.lookup_url"):
            await kept.publish()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"", "not the text of one IP address"),
        (200, b"<html>10.0.0.1</html>", "not the text"),
        (200, b"10.0.0.1 10.0.0.2", "not the text"),
        (200, b"\xff\xfe", "not the text"),
        (200, b"1" * 100_000, "not the text"),
        (302, b"10.0.0.1", "status 302"),
        (404, b"10.0.0.1", "status 404"),
        (200, b"0.0.0.0", "nobody can dial 0.0.0.0"),
        (200, b"224.0.0.1", "nobody can dial"),
    ],
)
def test_an_answer_that_is_no_address_is_refused(status: int, body: bytes, reason: str) -> None:
    async def scenario() -> None:
        async with service((status, body)) as url:
            with pytest.raises(Unavailable, match=reason):
                await look_up(url)

    asyncio.run(scenario())


@in_loop
async def test_both_families_are_understood() -> None:
    async with service((200, b"2001:DB8::1\n"), (200, b" 10.0.0.1 ")) as url:
        assert await look_up(url) == "2001:db8::1"
        assert await look_up(url) == "10.0.0.1"
