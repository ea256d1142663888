"""Setting weights as the services do it: the clock, the refusals, the dry run, the way back."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import bittensor as bt
import pytest

from mapreduce.chain.metagraph import fetch_metagraph
from mapreduce.chain.weights import (
    WeightsClock,
    plan_weights,
    read_weights,
    read_weights_clock,
    set_weights,
)
from mapreduce.errors import ChainUnavailable, InvalidArgument, NotRegistered, Refused
from test.unit.test_chain_support import (
    NETUID,
    FakeClock,
    created,
    isolated,  # noqa: F401
    keys,
    opened,
    register,
    stake,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ONE = keys("one")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def with_miners(client: bt.Client, count: int = 3) -> None:
    """A validator with stake as uid 0, then miners, one block ago."""
    assert (await register(client, ONE)).success
    for i in range(count):
        assert (await register(client, keys(f"miner-{i}"))).success
    assert (await stake(client, ONE, 10)).success


def test_what_is_set_is_what_was_planned_and_can_be_read_back(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock, tempo=20), clock) as client:
            await with_miners(client)
            clock.blocks(1)
            weights = {1: 0.2, 2: 0.6, 3: 0.0}
            planned = await plan_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
            assert planned == {1: 21845, 2: 65535}
            assert await read_weights(client, NETUID, 0) == {}
            done = await set_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
            assert (done.block, done.extrinsic_id, done.commit_reveal) == (2, "2-0001", False)
            row = await client.query(("SubtensorModule", "Weights"), [NETUID, 0])
            assert dict(row) == planned
            assert await read_weights(client, NETUID, 0) == pytest.approx({1: 0.25, 2: 0.75})
            clock.blocks(20)
            metagraph = await fetch_metagraph(client, NETUID)
            assert [n.incentive for n in metagraph.neurons] == pytest.approx(
                [0, 0.25, 0.75, 0], abs=2e-5
            )
            assert [n.dividends for n in metagraph.neurons] == [1, 0, 0, 0]
            assert [n.last_update for n in metagraph.neurons] == [2, 0, 0, 0]
            assert [n.registered_at_block for n in metagraph.neurons] == [1, 1, 1, 1]

    asyncio.run(scenario())


def test_a_plan_knows_the_limit_on_one_weight_and_its_exception(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        limit = {"max_weights_limit": 32768}  # half
        path = created(tmp_path / "c.sqlite", clock, hyperparameters=limit)
        async with opened(path, clock) as client:
            await with_miners(client)

            async def set_as_planned(weights: Mapping[int, float]) -> dict[int, float]:
                plan = await plan_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
                await set_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
                row = await client.query(("SubtensorModule", "Weights"), [NETUID, 0])
                assert dict(row) == plan
                return await read_weights(client, NETUID, 0)

            shares = await set_as_planned({1: 8.0, 2: 1.0, 3: 1.0})
            assert shares == pytest.approx({1: 0.5, 2: 0.25, 3: 0.25}, abs=1e-5)
            assert await set_as_planned({0: 5.0}) == {0: 1.0}
            with pytest.raises(Refused, match="MaxWeightExceeded"):
                await set_as_planned({1: 1.0})

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "none is above 0"),
        ({1: 0.0, 2: 0.0}, "none is above 0"),
        ({1: math.nan, 2: 1.0}, "uid 1 has nan"),
        ({1: 1.0, 2: math.inf}, "uid 2 has inf"),
        ({1: 1.0, 2: -0.1}, "uid 2 has -0.1"),
        ({-1: 1.0}, "-1 is no uid"),
        ({65536: 1.0}, "65536 is no uid"),
    ],
)
def test_weights_that_say_nothing_never_reach_the_chain(
    tmp_path: Path, weights: Mapping[int, float], message: str
) -> None:
    async def scenario() -> None:
        client = bt.Client("ws://127.0.0.1:1")  # never connected: a request would fail otherwise
        for use in (set_weights, plan_weights):
            with pytest.raises(InvalidArgument, match=message):
                await use(client, ONE.hotkey, NETUID, weights, version_key=0)

    asyncio.run(scenario())


def test_refusals_before_and_after_signing_carry_the_chains_code(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        limits = {"weights_rate_limit": 5, "min_allowed_weights": 2, "weights_version": 3}
        path = created(tmp_path / "c.sqlite", clock, hyperparameters=limits)
        async with opened(path, clock) as client:
            both = {1: 1.0, 2: 1.0}

            async def refused(
                weights: Mapping[int, float] = both, version_key: int = 3, name: str = "one"
            ) -> tuple[str, str]:
                key = keys(name).hotkey
                with pytest.raises(Refused) as caught:
                    await set_weights(client, key, NETUID, weights, version_key=version_key)
                return caught.value.code, str(caught.value)

            assert (await refused())[0] == "not_registered"
            await with_miners(client)
            assert (await refused({1: 1.0}))[0] == "invalid_argument"
            code, text = await refused(version_key=2)
            assert (code, "IncorrectWeightVersionKey" in text) == ("invalid_argument", True)
            code, text = await refused(name="miner-0")
            assert (code, "NeuronNoValidatorPermit" in text) == ("not_authorized", True)
            assert text.startswith("setting weights on netuid 10: the chain refused: ")
            clock.blocks(1)
            await set_weights(client, ONE.hotkey, NETUID, both, version_key=3)
            code, text = await refused()
            assert (code, "Retry in ~5 blocks" in text) == ("rate_limited", True)
            with pytest.raises(Refused) as caught:
                await plan_weights(client, ONE.hotkey, NETUID, both, version_key=3)
            assert caught.value.code == "rate_limited"

    asyncio.run(scenario())


def test_a_chain_that_keeps_silent_is_unavailable(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock), clock) as client:
            await with_miners(client)

            async def never(*_: Any, **__: Any) -> Any:
                await asyncio.Event().wait()

            monkeypatch.setattr(client._substrate, "submit", never)
            with pytest.raises(ChainUnavailable, match=r"not in a block within 0\.01 s"):
                await set_weights(
                    client, ONE.hotkey, NETUID, {1: 1.0}, version_key=0, timeout_s=0.01
                )
        for request in (
            set_weights(client, ONE.hotkey, NETUID, {1: 1.0}, version_key=0),
            plan_weights(client, ONE.hotkey, NETUID, {1: 1.0}, version_key=0),
            read_weights(client, NETUID, 0),
            read_weights_clock(client, NETUID, 0),
        ):
            with pytest.raises(ChainUnavailable, match="no answer from the chain"):
                await request

    asyncio.run(scenario())


def test_where_weights_are_committed_the_result_says_so(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        switches = {"commit_reveal_weights_enabled": True}
        path = created(tmp_path / "c.sqlite", clock, hyperparameters=switches)
        async with opened(path, clock) as client:
            await with_miners(client)
            weights = {1: 1.0, 2: 3.0}
            planned = await plan_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
            assert planned == {1: 21845, 2: 65535}
            done = await set_weights(client, ONE.hotkey, NETUID, weights, version_key=0)
            assert done.commit_reveal
            assert await read_weights(client, NETUID, 0) == {}
            assert (await read_weights_clock(client, NETUID, 0)).commit_reveal

    asyncio.run(scenario())


def test_the_clock_says_when_weights_may_be_set(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, strict=True, tempo=20)
        async with opened(path, clock) as client:
            await with_miners(client)
            clock.blocks(30)
            read = await read_weights_clock(client, NETUID, 0)
            assert read == WeightsClock(
                netuid=NETUID,
                uid=0,
                block=31,
                last_update_block=1,
                rate_limit_blocks=100,
                tempo_blocks=20,
                blocks_to_epoch=10,
                permit=True,
                commit_reveal=False,
                min_allowed=1,
                block_time_s=12.0,
            )
            assert read.wait_blocks == 70
            assert not (await read_weights_clock(client, NETUID, 1)).permit
            clock.blocks(70)
            assert (await read_weights_clock(client, NETUID, 0)).wait_blocks == 0
            await set_weights(client, ONE.hotkey, NETUID, {1: 1.0}, version_key=0)
            read = await read_weights_clock(client, NETUID, 0)
            assert (read.last_update_block, read.wait_blocks) == (101, 100)
            for netuid, uid in ((NETUID, 4), (99, 0)):
                with pytest.raises(
                    NotRegistered, match=f"no hotkey holds uid {uid} on .* {netuid}"
                ):
                    await read_weights_clock(client, netuid, uid)

    asyncio.run(scenario())


def test_who_never_set_weights_need_not_wait_and_the_owner_needs_no_permit(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        limit = {"weights_rate_limit": 50, "tempo": 0}
        path = created(tmp_path / "c.sqlite", clock, hyperparameters=limit)
        async with opened(path, clock) as client:
            netuid = (await client.execute(bt.RegisterSubnet(), ONE)).data["netuid"]
            read = await read_weights_clock(client, netuid, 0)
            assert (read.last_update_block, read.wait_blocks, read.permit) == (0, 0, True)
            assert read.blocks_to_epoch is None

    asyncio.run(scenario())
