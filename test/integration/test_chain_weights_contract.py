"""What the validator relies on, through the real client, on every kind of chain.

As in `test_chain_contract`: on the embedded chain, and on a node where one is named.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import bittensor as bt
import pytest

from mapreduce.chain import open_chain
from mapreduce.chain.embedded import create_chain
from mapreduce.chain.metagraph import fetch_metagraph
from mapreduce.chain.weights import (
    plan_weights,
    read_weights,
    read_weights_clock,
    set_weights,
)
from mapreduce.errors import Refused
from test.integration.test_chain_contract import MONEY_TAO, chain  # noqa: F401
from test.unit.test_chain_support import (
    NETUID,
    error_name,
    isolated,  # noqa: F401
    keys,
    register,
    stake,
)

if TYPE_CHECKING:
    from pathlib import Path

    from test.integration.test_chain_contract import Chain


def test_a_neuron_without_a_permit_sets_weights_for_nobody(chain: Chain) -> None:  # noqa: F811
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet, other = await chain.registered(client), await chain.registered(client)
            uid = await client.neurons.uid(wallet.hotkey.ss58_address, chain.netuid)
            another = await client.neurons.uid(other.hotkey.ss58_address, chain.netuid)
            assert uid is not None
            assert another is not None
            clock = await read_weights_clock(client, chain.netuid, uid)
            assert (clock.uid, clock.permit) == (uid, False)
            assert clock.tempo_blocks > 0
            assert clock.block_time_s > 0
            assert await read_weights(client, chain.netuid, uid) == {}
            weights = {another: 1.0}
            with pytest.raises(Refused) as caught:
                await set_weights(client, wallet.hotkey, chain.netuid, weights, version_key=0)
            # A node of which the rate limit counts from registration on says that first.
            assert caught.value.code in ("not_authorized", "rate_limited", "insufficient_balance")

    asyncio.run(scenario())


def test_weights_are_set_and_read_back(chain: Chain) -> None:  # noqa: F811
    async def scenario() -> None:
        async with chain.opened() as client:
            validator, miner = await chain.registered(client), await chain.registered(client)
            intent = bt.AddStake(
                hotkey_ss58=validator.hotkey.ss58_address,
                netuid=chain.netuid,
                amount_tao=bt.tao(MONEY_TAO / 2),
            )
            assert (await client.execute(intent, validator)).success
            uid = await client.neurons.uid(validator.hotkey.ss58_address, chain.netuid)
            weighed = await client.neurons.uid(miner.hotkey.ss58_address, chain.netuid)
            assert uid is not None
            assert weighed is not None
            clock = await read_weights_clock(client, chain.netuid, uid)
            while not clock.permit:
                await client.wait_for_epoch(chain.netuid, timeout=600)
                clock = await read_weights_clock(client, chain.netuid, uid)
            await client.wait_for_block(clock.block + clock.wait_blocks, timeout=600)
            key, weights = validator.hotkey, {weighed: 1.0, uid: 1.0}
            planned = await plan_weights(client, key, chain.netuid, weights, version_key=0)
            assert planned == {weighed: 65535, uid: 65535}
            done = await set_weights(client, key, chain.netuid, weights, version_key=0)
            assert done.commit_reveal == clock.commit_reveal
            read = await read_weights(client, chain.netuid, uid)
            assert read == ({} if clock.commit_reveal else {weighed: 0.5, uid: 0.5})
            after = await read_weights_clock(client, chain.netuid, uid)
            assert after.last_update_block == done.block > 0
            neuron = (await fetch_metagraph(client, chain.netuid)).by_uid(uid)
            assert neuron is not None
            assert neuron.last_update == done.block

    asyncio.run(scenario())


def test_an_unregistered_hotkey_sets_no_weights(chain: Chain) -> None:  # noqa: F811
    async def scenario() -> None:
        async with chain.opened() as client:
            stranger = keys(f"mapreduce-{secrets.token_hex(8)}").hotkey
            for use in (set_weights, plan_weights):
                with pytest.raises(Refused) as caught:
                    await use(client, stranger, chain.netuid, {0: 1.0}, version_key=0)
                assert caught.value.code == "not_registered"

    asyncio.run(scenario())


def test_a_certificate_and_a_commitment_can_be_read_back(chain: Chain) -> None:  # noqa: F811
    async def scenario() -> None:
        async with chain.opened() as client:
            wallet = await chain.registered(client)
            hotkey = wallet.hotkey.ss58_address
            digest = secrets.token_bytes(32)
            intent = bt.ServeAxonTls(
                netuid=chain.netuid, ip="127.0.0.2", port=18092, certificate="0x01" + digest.hex()
            )
            assert (await client.execute(intent, wallet)).success
            item = ("SubtensorModule", "NeuronCertificates")
            stored = await client.query(item, [chain.netuid, hotkey])
            key = stored["public_key"]
            assert (bytes.fromhex(key[2:]) if isinstance(key, str) else bytes(key)) == digest
            assert stored["algorithm"] == 1
            neuron = (await fetch_metagraph(client, chain.netuid)).by_hotkey(hotkey)
            assert neuron is not None
            assert (neuron.ip, neuron.port) == ("127.0.0.2", 18092)
            call = bt.calls.Commitments.set_commitment(
                netuid=chain.netuid, info={"fields": [[{"Raw5": b"hello"}]]}
            )
            assert error_name(await client.submit_call(call, wallet, signer="hotkey")) is None
            mine = (await client.subnets.commitments(chain.netuid))[hotkey]
            assert (mine.uid, mine.value) == (neuron.uid, "hello")

    asyncio.run(scenario())


def test_weights_become_incentive_with_the_next_epoch(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "chain.sqlite"
        limits = {"weights_rate_limit": 5}
        create_chain(path, block_time_s=0.02, strict=True, tempo=5, hyperparameters=limits)
        async with open_chain(f"embedded:{path}") as client:
            wallets = [keys("validator"), keys("slow"), keys("fast")]
            for wallet in wallets:
                assert (await register(client, wallet)).success
            assert (await stake(client, wallets[0], 10)).success
            key = wallets[0].hotkey
            await client.wait_for_epoch(NETUID, timeout=10)  # which brings the permit
            clock = await read_weights_clock(client, NETUID, 0)
            await client.wait_for_block(clock.block + clock.wait_blocks, timeout=10)
            weights = {1: 1.0, 2: 3.0}
            planned = await plan_weights(client, key, NETUID, weights, version_key=0)
            done = await set_weights(client, key, NETUID, weights, version_key=0)
            event = await client.wait_for_epoch(NETUID, timeout=10)
            assert event.block > done.block
            assert await read_weights(client, NETUID, 0) == pytest.approx(
                {uid: value / sum(planned.values()) for uid, value in planned.items()}
            )
            metagraph = await fetch_metagraph(client, NETUID)
            shares = [neuron.incentive for neuron in metagraph.neurons]
            assert shares == pytest.approx([0, 0.25, 0.75], abs=2e-5)
            assert metagraph.neurons[0].last_update == done.block

    asyncio.run(scenario())
