"""The rules of the embedded chain, through the real client, on a clock that the test sets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import bittensor as bt
import pytest

from mapreduce.chain import executive
from mapreduce.chain import extrinsic as codec
from mapreduce.chain.actions import register_hotkey
from test.unit.test_chain_support import (
    NETUID,
    FakeClock,
    created,
    error_name,
    isolated,  # noqa: F401
    keys,
    opened,
    permits,
    register,
    serve,
    stake,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def chain(tmp_path: Path, clock: FakeClock) -> Path:
    return created(tmp_path / "chain.sqlite", clock)


@pytest.fixture
def strict_chain(tmp_path: Path, clock: FakeClock) -> Path:
    return created(tmp_path / "chain.sqlite", clock, strict=True, tempo=20)


# Who may do what ----------------------------------------------------------------------------------


def test_what_the_chain_refuses_and_under_which_name(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        one, other = keys("one"), keys("other")
        hotkey = one.hotkey.ss58_address
        calls = bt.calls.SubtensorModule
        async with opened(chain, clock) as client:

            async def refused(call: object, signer: object) -> str | None:
                return error_name(await client.submit_call(call, signer))

            assert await refused(calls.burned_register(netuid=99, hotkey=hotkey), one.coldkey) == (
                "SubnetNotExists"
            )
            assert await refused(calls.burned_register(netuid=0, hotkey=hotkey), one.coldkey) == (
                "RegistrationNotPermittedOnRootSubnet"
            )
            assert error_name(await stake(client, one, 1)) == "HotKeyAccountNotExists"
            assert error_name(await serve(client, one, "10.0.0.1")) == (
                "HotKeyNotRegisteredInNetwork"
            )
            assert (await register(client, one)).success
            assert error_name(await register(client, one)) == "HotKeyAlreadyRegisteredInSubNet"
            # On another subnet the hotkey is free, but it is not this coldkey's.
            assert await refused(calls.burned_register(netuid=1, hotkey=hotkey), other.coldkey) == (
                "NonAssociatedColdKey"
            )
            # The coldkey cannot speak for its hotkey.
            assert error_name(
                await client.execute(
                    bt.ServeAxon(netuid=NETUID, ip="10.0.0.1", port=1), one.coldkey
                )
            ) == ("HotKeyNotRegisteredInNetwork")
            assert error_name(await serve(client, one, "10.0.0.1", 0)) == "InvalidPort"
            assert error_name(await serve(client, one, "255.255.255.255")) == "InvalidIpAddress"
            assert error_name(await stake(client, one, 0.001)) == "AmountTooLow"
            assert error_name(await stake(client, one, 10_000)) == "NotEnoughBalanceToStake"
            remove = calls.remove_stake(hotkey=hotkey, netuid=NETUID, amount_unstaked=10**9)
            assert await refused(remove, one.coldkey) == "NotEnoughStakeToWithdraw"
            limit = calls.add_stake_limit(
                hotkey=hotkey,
                netuid=NETUID,
                amount_staked=10**9,
                limit_price=10**9 - 1,
                allow_partial=False,
            )
            assert await refused(limit, one.coldkey) == "SlippageTooHigh"
            far = bt.calls.Balances.transfer_keep_alive(
                dest=other.coldkey.ss58_address, value=10**15
            )
            assert await refused(far, one.coldkey) == "FundsUnavailable"
            assert await refused(calls.start_call(netuid=NETUID), one.coldkey) == "NotSubnetOwner"

    asyncio.run(scenario())


def test_an_unknown_call_or_argument_is_refused_before_it_is_signed(
    chain: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(chain, clock) as client:
            with pytest.raises(bt.ChainError, match=r"does not serve SubtensorModule.set_children"):
                await client.compose(
                    ("SubtensorModule", "set_children", {"hotkey": "x", "netuid": 1})
                )
            with pytest.raises(bt.ChainError, match=r"netuid = 65536 is not a u16"):
                await client.compose(bt.calls.SubtensorModule.start_call(netuid=65536))
            with pytest.raises(bt.ChainError, match="hotkey = 'nobody' is not an ss58"):
                await client.compose(
                    bt.calls.SubtensorModule.burned_register(netuid=10, hotkey="nobody")
                )
            with pytest.raises(bt.ChainError, match=r"DelegateInfoRuntimeApi\.get_delegates"):
                await client.runtime(("DelegateInfoRuntimeApi", "get_delegates"), [])
            with pytest.raises(NotImplementedError, match="decode_scale"):
                await client.decode_scale("Call", b"")

    asyncio.run(scenario())


def test_a_new_subnet_takes_stake_only_after_its_owner_started_it(
    chain: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        owner = keys("owner")
        async with opened(chain, clock) as client:
            result = await client.execute(bt.RegisterSubnet(), owner)
            netuid = result.data["netuid"]
            assert netuid == 2  # the first that is free
            assert await client.neurons.uid(owner.hotkey.ss58_address, netuid) == 0
            intent = bt.AddStake(
                hotkey_ss58=owner.hotkey.ss58_address, netuid=netuid, amount_tao=bt.tao(5)
            )
            assert error_name(await client.execute(intent, owner)) == "SubtokenDisabled"
            assert (await client.execute(bt.StartCall(netuid=netuid), owner)).success
            assert (await client.execute(intent, owner)).success

    asyncio.run(scenario())


# Nonces and signatures ----------------------------------------------------------------------------


async def _signed(client: bt.Client, value_rao: int = 1, nonce: int = 0) -> bytes:
    call = await client.compose(
        bt.calls.Balances.transfer_keep_alive(
            dest=keys("other").coldkey.ss58_address, value=value_rao
        )
    )
    data, _ = await client._substrate.sign_extrinsic(
        call, keys("one").coldkey, nonce=nonce, period=8
    )
    return data


async def _submitted(client: bt.Client, data: bytes) -> str | None:
    return error_name(await client._substrate.submit_signed(data, keys("one").coldkey))


def test_only_the_next_nonce_is_included_and_only_once(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        one = keys("one").coldkey.ss58_address
        async with opened(chain, clock) as client:
            first = await _signed(client, nonce=0)
            assert await _submitted(client, await _signed(client, nonce=1)) == "Future"
            assert await _submitted(client, first) is None
            assert await _submitted(client, first) == "Stale"
            assert await client._substrate.account_next_index(one) == 1

    asyncio.run(scenario())


def test_a_forged_extrinsic_changes_nothing(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        one, other = keys("one").coldkey.ss58_address, keys("other").coldkey.ss58_address
        async with opened(chain, clock) as client:
            data = await _signed(client, value_rao=1)
            honest = codec.decode(data)
            richer = codec.Call("Balances", "transfer_keep_alive", {"dest": one, "value": 10**12})
            forged = (
                replace(honest, call=richer),
                replace(honest, signer=other),
                replace(honest, period=None),
                replace(honest, signature=bytes(64)),
                replace(honest, signature=b"short"),
                replace(honest, signer="nobody"),
                replace(honest, crypto_type=0),
            )
            for extrinsic in forged:
                assert await _submitted(client, extrinsic.encode()) == "BadProof"
            for garbage in (b"", b"{}", b"[1]", data[:-1], data + b" ", b"[" * 10_000):
                assert await _submitted(client, garbage) == "BadRequest"
            assert await client._substrate.account_next_index(one) == 0
            assert (await client.balances.get(one)).tao == 10_000
            assert await _submitted(client, data) is None

    asyncio.run(scenario())


def test_an_extrinsic_of_another_chain_is_void(
    chain: Path, clock: FakeClock, tmp_path: Path
) -> None:
    async def scenario() -> None:
        elsewhere = created(tmp_path / "elsewhere.sqlite", clock)
        async with opened(chain, clock) as client, opened(elsewhere, clock) as stranger:
            assert await _submitted(client, await _signed(stranger)) == "BadProof"

    asyncio.run(scenario())


def test_an_extrinsic_expires_with_its_era(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        async with opened(chain, clock) as client:
            data = await _signed(client)
            clock.blocks(8)
            assert await _submitted(client, data) == "AncientBirthBlock"
            in_time = await _signed(client)
            clock.blocks(7)
            assert await _submitted(client, in_time) is None

    asyncio.run(scenario())


def test_a_failed_call_uses_its_nonce_and_undoes_the_rest(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        one = keys("one")
        async with opened(chain, clock) as client:
            # Too poor for a registration, after the hotkey was already recorded as its own.
            spend = bt.calls.Balances.transfer_keep_alive(
                dest=keys("other").coldkey.ss58_address, value=10_000 * 10**9 - 1000
            )
            assert (await client.submit_call(spend, one.coldkey)).success
            assert error_name(await register(client, one)) == "NotEnoughBalanceToStake"
            assert await client._substrate.account_next_index(one.coldkey.ss58_address) == 2
            assert await client.neurons.hotkey_owner(one.hotkey.ss58_address) is None

    asyncio.run(scenario())


def test_the_shielded_call_is_verified_like_any_other(chain: Path, clock: FakeClock) -> None:
    """A carrier whose inner extrinsic is invalid lands alone."""

    async def scenario() -> None:
        one = keys("one")
        async with opened(chain, clock) as client:
            substrate = client._substrate
            call = await client.compose(
                bt.calls.SubtensorModule.burned_register(
                    netuid=NETUID, hotkey=one.hotkey.ss58_address
                )
            )
            carrier = await client.compose(bt.calls.MevShield.submit_encrypted(ciphertext=b"?"))
            _, inner_hash = await substrate.sign_extrinsic(call, one.coldkey, nonce=2, period=8)
            result = await substrate.submit(carrier, one.coldkey, nonce=0)
            assert result.success
            assert result.block_hash is not None
            assert await substrate.find_extrinsic(inner_hash, result.block_hash) is None
            assert await client.neurons.uid(one.hotkey.ss58_address, NETUID) is None
            # What was sealed is spent: the next carrier brings nothing.
            assert (await substrate.submit(carrier, one.coldkey)).success
            assert await substrate.account_next_index(one.coldkey.ss58_address) == 2

    asyncio.run(scenario())


def test_shielded_calls_of_one_key_in_one_process_do_not_mix(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        wallets = [keys("one", f"hot-{i}") for i in range(6)]
        async with opened(chain, clock) as client:
            registrations = (register_hotkey(client, wallet, NETUID) for wallet in wallets)
            uids = await asyncio.gather(*registrations)
            assert sorted(uids) == list(range(6))
            for uid, wallet in zip(uids, wallets, strict=True):
                assert await client.neurons.uid(wallet.hotkey.ss58_address, NETUID) == uid

    asyncio.run(scenario())


# Uids, permits and epochs -------------------------------------------------------------------------


def test_a_full_subnet_evicts_the_oldest_neuron_that_is_not_immune(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(
            tmp_path / "small.sqlite", clock, max_uids=2, hyperparameters={"immunity_period": 10}
        )
        async with opened(path, clock) as client:
            first, second, third = keys("a"), keys("b"), keys("c")
            assert (await register(client, first)).success
            assert (await serve(client, first, "10.0.0.1")).success
            clock.blocks(1)
            assert (await register(client, second)).success
            assert error_name(await register(client, third)) == "NoNeuronIdAvailable"
            clock.blocks(9)
            assert (await register(client, third)).success
            assert await client.neurons.uid(first.hotkey.ss58_address, NETUID) is None
            assert await client.neurons.netuids_for_hotkey(first.hotkey.ss58_address) == []
            assert await client.neurons.uid(third.hotkey.ss58_address, NETUID) == 0
            metagraph = await client.subnets.metagraph(NETUID, commitments=False)
            assert metagraph is not None
            assert [n.hotkey for n in metagraph.neurons] == [
                third.hotkey.ss58_address,
                second.hotkey.ss58_address,
            ]
            assert metagraph.neurons[0].axon is None
            assert error_name(await serve(client, first, "10.0.0.1")) == (
                "HotKeyNotRegisteredInNetwork"
            )

    asyncio.run(scenario())


def test_permits_go_to_the_highest_stakes_at_once(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "two.sqlite", clock, hyperparameters={"max_validators": 2})
        async with opened(path, clock) as client:
            wallets = [keys(name) for name in "abc"]
            for wallet, tao in zip(wallets, (10, 20, 30), strict=True):
                await register(client, wallet)
                assert (await stake(client, wallet, tao)).success
            assert await permits(client) == [False, True, True]
            unstake = bt.RemoveStake(
                hotkey_ss58=wallets[2].hotkey.ss58_address, netuid=NETUID, amount_alpha="all"
            )
            assert (await client.execute(unstake, wallets[2])).success
            assert await permits(client) == [True, True, False]

    asyncio.run(scenario())


def test_strict_permits_wait_for_the_epoch(strict_chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        async with opened(strict_chain, clock) as client:
            one = keys("one")
            await register(client, one)
            assert (await stake(client, one, 10)).success
            clock.blocks(19)
            assert await permits(client) == [False]
            clock.blocks(1)
            assert await permits(client) == [True]  # a read is enough to run what is due
            assert (await client.epochs.epoch_status(NETUID))["last_epoch_block"] == 21

    asyncio.run(scenario())


def test_missed_epochs_run_as_one_and_keep_their_phase(
    strict_chain: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(strict_chain, clock) as client:
            clock.blocks(20 * 50 + 7)
            status = await client.epochs.epoch_status(NETUID)
            assert status["block"] == 1008
            assert status["last_epoch_block"] == 1001
            assert status["next_epoch_start_block"] == 1021
            assert status["epoch_index"] == 1

    asyncio.run(scenario())


# Strict -------------------------------------------------------------------------------------------


def test_strict_refuses_loopback_and_serving_too_often(
    strict_chain: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(strict_chain, clock) as client:
            one = keys("one")
            await register(client, one)
            for loopback in ("127.0.0.1", "::1"):
                assert error_name(await serve(client, one, loopback)) == "InvalidIpAddress"
            assert (await serve(client, one, "127.0.0.2")).success
            clock.blocks(49)
            refused = await serve(client, one, "127.0.0.2", 8092)
            assert error_name(refused) == "ServingRateLimitExceeded"
            assert refused.error is not None
            assert refused.error.code is bt.ErrorCode.RATE_LIMITED
            clock.blocks(1)
            assert (await serve(client, one, "127.0.0.2", 8092)).success

    asyncio.run(scenario())


def test_without_strict_loopback_is_served_as_often_as_one_likes(
    chain: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(chain, clock) as client:
            one = keys("one")
            await register(client, one)
            for ip in ("127.0.0.1", "::1", "127.0.0.1"):
                assert (await serve(client, one, ip)).success

    asyncio.run(scenario())


@pytest.mark.parametrize(("strict", "last_update"), [(False, 0), (True, 6)])
def test_only_strict_counts_a_registration_as_an_update(
    tmp_path: Path, clock: FakeClock, strict: bool, last_update: int
) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "chain.sqlite", clock, strict=strict)
        clock.blocks(5)
        async with opened(path, clock) as client:
            await register(client, keys("one"))
            (neuron,) = await client.neurons.all(NETUID)
            assert neuron.last_update == last_update

    asyncio.run(scenario())


# Blocks -------------------------------------------------------------------------------------------


def test_blocks_follow_the_clock_and_never_go_back(chain: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        async with opened(chain, clock) as client:
            assert await client.block() == 1
            clock.blocks(3)
            assert await client.block() == 4
            await register(client, keys("one"))
            clock.blocks(-2)
            assert await client.block() == 4
            clock.blocks(3)
            assert await client.block() == 5
            with pytest.raises(bt.ChainError, match="block 6 does not exist"):
                await client.timestamp(block=6)
            assert await client.block_info(6) is None
            info = await client.block_info(4)
            assert info is not None
            assert [e["call"]["call_function"] for e in info.extrinsics] == [
                "set",
                "burned_register",
            ]
            assert info.timestamp.timestamp() == 1_700_000_000.0 + 36

    asyncio.run(scenario())


def test_the_log_of_old_blocks_is_forgotten(
    chain: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(executive, "BLOCKS_KEPT", 10)
        async with opened(chain, clock) as client:
            await register(client, keys("one"))
            clock.blocks(10)
            await register(client, keys("two"))
            assert len(await client._substrate.events(await client._substrate.block_hash(1))) == 2
            clock.blocks(1)
            await register(client, keys("three"))
            assert await client._substrate.events(await client._substrate.block_hash(1)) == []

    asyncio.run(scenario())
