"""What the services rely on, through the real client, on every kind of chain.

The same tests run on the embedded chain and, where `MAPREDUCE_TEST_ENDPOINT` names a node on which
//Alice has money, on that node (`MAPREDUCE_TEST_NETUID`, 1 by default). Every run uses keys of its
own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import bittensor as bt
import pytest
from bittensor.sp_core import Keypair

from mapreduce.chain import open_chain
from mapreduce.chain.axons import serve_axon
from mapreduce.chain.embedded import create_chain
from mapreduce.chain.metagraph import fetch_metagraph
from test.unit.test_chain_support import (
    NETUID,
    Keys,
    error_name,
    isolated,  # noqa: F401
    keys,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ENDPOINT = os.environ.get("MAPREDUCE_TEST_ENDPOINT")
MONEY_TAO = 100


@dataclass(frozen=True)
class Chain:
    network: str
    netuid: int

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[bt.Client]:
        async with open_chain(self.network) as client:
            yield client

    async def newcomer(self, client: bt.Client) -> Keys:
        """Keys that the chain has never seen, with some money on the coldkey."""
        wallet = keys(f"mapreduce-{secrets.token_hex(8)}")
        payment = bt.Transfer(dest_ss58=wallet.coldkey.ss58_address, amount_tao=bt.tao(MONEY_TAO))
        alice = Keypair.create_from_uri("//Alice")
        (await client.execute(payment, alice, retries=5)).raise_for_failure()
        return wallet

    async def registered(self, client: bt.Client) -> Keys:
        wallet = await self.newcomer(client)
        result = await client.execute(bt.BurnedRegister(netuid=self.netuid), wallet)
        result.raise_for_failure()
        return wallet


@pytest.fixture(
    params=[
        "embedded",
        pytest.param(
            "node",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not ENDPOINT, reason="MAPREDUCE_TEST_ENDPOINT is not set"),
            ],
        ),
    ]
)
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Chain:
    if request.param == "node":
        assert ENDPOINT is not None
        return Chain(ENDPOINT, int(os.environ.get("MAPREDUCE_TEST_NETUID", "1")))
    return Chain(f"embedded:{tmp_path / 'chain.sqlite'}", NETUID)


def test_registering_as_the_sdk_does_it_gives_a_uid(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.newcomer(client)
            hotkey = wallet.hotkey.ss58_address
            assert await client.neurons.uid(hotkey, chain.netuid) is None
            result = await client.execute(bt.BurnedRegister(netuid=chain.netuid), wallet)
            assert result.success
            assert result.data["shielded"]
            assert {"NeuronRegistered", "ExtrinsicSuccess"} <= {
                event["event"]["event_id"] for event in result.events
            }
            uid = await client.neurons.uid(hotkey, chain.netuid)
            assert uid is not None
            assert await client.neurons.hotkey_owner(hotkey) == wallet.coldkey.ss58_address
            assert chain.netuid in await client.neurons.netuids_for_hotkey(hotkey)
            again = await client.execute(bt.BurnedRegister(netuid=chain.netuid), wallet)
            assert error_name(again) == "HotKeyAlreadyRegisteredInSubNet"
            assert again.error is not None
            assert again.error.code is bt.ErrorCode.ALREADY_EXISTS

    asyncio.run(scenario())


def test_stake_moves_money_from_the_coldkey_to_the_hotkey(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.registered(client)
            hotkey, coldkey = wallet.hotkey.ss58_address, wallet.coldkey.ss58_address
            before = await client.balances.get(coldkey)
            intent = bt.AddStake(hotkey_ss58=hotkey, netuid=chain.netuid, amount_tao=bt.tao(5))
            assert (await client.plan(intent, wallet)).ok
            assert (await client.execute(intent, wallet)).success
            after = await client.balances.get(coldkey)
            assert 5 <= before.tao - after.tao < 5.1  # the rest is a fee
            staked = await client.staking.get(coldkey, hotkey, chain.netuid)
            assert staked.rao > 0
            positions = await client.staking.positions(coldkey)
            assert [(p.hotkey, p.netuid) for p in positions] == [(hotkey, chain.netuid)]
            metagraph = await fetch_metagraph(client, chain.netuid)
            neuron = metagraph.by_hotkey(hotkey)
            assert neuron is not None
            assert neuron.stake_tao == pytest.approx(staked.alpha, rel=0.01)
            intent = bt.RemoveStake(hotkey_ss58=hotkey, netuid=chain.netuid, amount_alpha="all")
            assert (await client.execute(intent, wallet)).success
            assert (await client.balances.get(coldkey)).tao > after.tao

    asyncio.run(scenario())


def test_more_than_the_coldkey_holds_cannot_be_staked(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.registered(client)
            held = await client.balances.get(wallet.coldkey.ss58_address)
            intent = bt.AddStake(
                hotkey_ss58=wallet.hotkey.ss58_address,
                netuid=chain.netuid,
                amount_tao=bt.tao(held.tao + 1),
            )
            result = await client.execute(intent, wallet)
            assert error_name(result) == "NotEnoughBalanceToStake"
            assert result.error is not None
            assert result.error.code is bt.ErrorCode.INSUFFICIENT_BALANCE

    asyncio.run(scenario())


def test_a_served_axon_stands_in_the_metagraph(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.registered(client)
            assert await serve_axon(client, wallet, chain.netuid, "127.0.0.2", 18091)
            neuron = (await fetch_metagraph(client, chain.netuid)).by_hotkey(
                wallet.hotkey.ss58_address
            )
            assert neuron is not None
            assert (neuron.ip, neuron.port) == ("127.0.0.2", 18091)
            assert not await serve_axon(client, wallet, chain.netuid, "127.0.0.2", 18091)
            lite = {n.hotkey: n for n in await client.neurons.all(chain.netuid)}
            axon = lite[wallet.hotkey.ss58_address].raw["axon_info"]
            assert (axon["ip"], axon["port"], axon["ip_type"]) == (0x7F000002, 18091, 4)

    asyncio.run(scenario())


def test_an_unregistered_hotkey_serves_nothing(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.newcomer(client)
            intent = bt.ServeAxon(netuid=chain.netuid, ip="127.0.0.2", port=1)
            result = await client.execute(intent, wallet)
            assert not result.success
            assert result.error is not None

    asyncio.run(scenario())


def test_the_fields_of_the_metagraph(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.registered(client)
            metagraph = await client.subnets.metagraph(chain.netuid)
            assert metagraph is not None
            neuron = metagraph.by_hotkey(wallet.hotkey.ss58_address)
            assert neuron is not None
            assert neuron.coldkey == wallet.coldkey.ss58_address
            assert neuron.active
            assert not neuron.validator_permit
            assert neuron.axon is None
            assert neuron.commitment is None
            assert 0 < neuron.block_at_registration <= metagraph.block
            assert metagraph.neuron(neuron.uid) is neuron
            assert metagraph.num_uids == len(metagraph) <= metagraph.max_uids
            assert metagraph.tempo > 0
            assert metagraph.price is not None
            full = await client.neurons.all(chain.netuid, lite=False)
            assert [n.uid for n in full] == list(range(len(metagraph)))
            assert await client.subnets.metagraph(4000, commitments=False) is None

    asyncio.run(scenario())


def test_hyperparameters_and_subnets_can_be_read(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            hyperparameters = await client.read("subnet_hyperparameters", netuid=chain.netuid)
            for name in (
                "tempo",
                "immunity_period",
                "weights_rate_limit",
                "serving_rate_limit",
                "max_validators",
                "commit_reveal_weights_enabled",
            ):
                assert name in hyperparameters
            assert await client.read("subnet_hyperparameters", netuid=4000) is None
            assert {0, 1, chain.netuid} <= {s.netuid for s in await client.subnets.all()}
            status = await client.epochs.epoch_status(chain.netuid)
            assert status["tempo"] == hyperparameters["tempo"]
            assert 0 <= status["blocks_remaining"] <= status["tempo"]

    asyncio.run(scenario())


def test_blocks_come_one_after_another(chain: Chain) -> None:
    async def scenario() -> None:
        async with chain.opened() as client:
            header = await client.wait_for_block(timeout=60)
            following = await client.wait_for_block(header.number + 2, timeout=60)
            assert following.number >= header.number + 2
            assert following.parent_hash
            info = await client.block_info(following.number)
            assert info is not None
            earlier = await client.timestamp(block=header.number)
            gap_s = (info.timestamp - earlier).total_seconds()
            blocks = following.number - header.number
            assert gap_s == pytest.approx(blocks * await client.block_time(), rel=0.5)
            seen = []
            async for block in client.blocks():
                seen.append(block.number)
                if len(seen) == 2:
                    break
            assert seen == [seen[0], seen[0] + 1]

    asyncio.run(scenario())


def test_an_epoch_can_be_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "chain.sqlite"
        create_chain(path, block_time_s=0.02, tempo=5)
        async with open_chain(f"embedded:{path}") as client:
            event = await client.wait_for_epoch(NETUID, timeout=10)
            assert (event.block - event.previous) % 5 == 0

    asyncio.run(scenario())


def test_the_blocking_client_works_too(tmp_path: Path) -> None:
    from mapreduce.chain.embedded import EMBEDDED_URL, EmbeddedSubstrate

    with bt.Subtensor(EMBEDDED_URL, substrate=EmbeddedSubstrate(tmp_path / "c.sqlite")) as chain:
        wallet = keys("one")
        assert chain.execute(bt.BurnedRegister(netuid=NETUID), wallet).success
        assert chain.neurons.uid(wallet.hotkey.ss58_address, NETUID) == 0
