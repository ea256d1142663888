"""What the embedded chain demands of weights, and what an epoch makes of them, through the real
client, on a clock that the test sets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import bittensor as bt
import pytest
from bittensor._generated.errors import ERRORS

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
    stake,
)

if TYPE_CHECKING:
    from pathlib import Path

    from test.unit.test_chain_support import Keys

NAMES = {info.name for info in ERRORS.values() if info.pallet == "SubtensorModule"}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def neurons(client: bt.Client, count: int) -> list[Keys]:
    wallets = [keys(f"neuron-{i}") for i in range(count)]
    for wallet in wallets:
        assert (await register(client, wallet)).success
    return wallets


async def refusal(client: bt.Client, wallet: Keys, **changed: Any) -> str | None:
    """The name under which the chain itself refuses weights, past the SDK's own checks."""
    arguments: dict[str, Any] = {
        "netuid": NETUID,
        "mecid": 0,
        "dests": [1, 2],
        "weights": [1, 3],
        "version_key": 7,
    }
    call = bt.calls.SubtensorModule.set_mechanism_weights(**arguments | changed)
    name = error_name(await client.submit_call(call, wallet.hotkey))
    assert name is None or name in NAMES
    return name


async def row(client: bt.Client, uid: int) -> list[list[int]] | None:
    found: list[list[int]] | None = await client.query(
        ("SubtensorModule", "Weights"), [NETUID, uid]
    )
    return found


async def column(client: bt.Client, name: str) -> list[float]:
    metagraph = await client.subnets.metagraph(NETUID, commitments=False)
    assert metagraph is not None
    return [float(getattr(neuron, name)) for neuron in metagraph.neurons]


# Refusals -----------------------------------------------------------------------------------------


def test_weights_are_refused_by_name_in_the_order_of_the_real_chain(
    tmp_path: Path, clock: FakeClock
) -> None:
    """Each call breaks one rule more than the next, so the names come in the order of the
    checks."""

    async def scenario() -> None:
        limits = {"weights_version": 7, "min_allowed_weights": 2, "max_weights_limit": 52428}
        path = created(tmp_path / "c.sqlite", clock, strict=True, tempo=20, hyperparameters=limits)
        async with opened(path, clock) as client:
            validator, poor, _ = await neurons(client, 3)
            assert (await stake(client, validator, 10)).success
            stranger = keys("stranger")

            async def refused(who: Keys = stranger, **changed: Any) -> str | None:
                return await refusal(client, who, **changed)

            assert await refused(netuid=0, weights=[1]) == "CanNotSetRootNetworkWeights"
            assert await refused(mecid=1, weights=[1]) == "WeightVecNotEqualSize"
            four = {"dests": [0, 1, 2, 2], "weights": [1, 1, 1, 1]}
            assert await refused(mecid=1, **four) == "MechanismDoesNotExist"
            assert await refused(netuid=99, **four) == "MechanismDoesNotExist"
            assert await refused(**four) == "UidsLengthExceedUidsInSubNet"
            assert await refused(version_key=6) == "HotKeyNotRegisteredInSubNet"
            assert await refused(poor, version_key=6) == "NotEnoughStakeToSetWeights"
            assert await refused(validator, version_key=6) == "IncorrectWeightVersionKey"
            twice = {"dests": [5, 5], "weights": [1, 1]}
            assert await refused(validator, **twice) == "SettingWeightsTooFast"
            clock.blocks(100)
            # The permit came with an epoch meanwhile; take it away again.
            unstake = bt.RemoveStake(
                hotkey_ss58=validator.hotkey.ss58_address, netuid=NETUID, amount_alpha=9.5
            )
            assert (await client.execute(unstake, validator.coldkey)).success
            clock.blocks(20)
            assert await permits(client) == [False, False, False]
            assert (await stake(client, validator, 9.5)).success
            assert await refused(validator, **twice) == "NeuronNoValidatorPermit"
            clock.blocks(20)
            assert await refused(validator, **twice) == "DuplicateUids"
            assert await refused(validator, dests=[5], weights=[1]) == "UidVecContainInvalidOne"
            assert await refused(validator, dests=[1], weights=[1]) == "WeightVecLengthIsLow"
            assert await refused(validator, weights=[1, 5]) == "MaxWeightExceeded"
            assert await row(client, 0) is None
            assert await refused(validator, weights=[1, 4]) is None
            assert await row(client, 0) == [[1, 16384], [2, 65535]]

    asyncio.run(scenario())


def test_a_neuron_may_always_weigh_itself_alone(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        limits = {"min_allowed_weights": 2, "max_weights_limit": 100}
        path = created(tmp_path / "c.sqlite", clock, hyperparameters=limits)
        async with opened(path, clock) as client:
            _, other, _ = await neurons(client, 3)
            assert await refusal(client, other, dests=[1], weights=[4]) is None
            assert await refusal(client, other, dests=[2], weights=[4]) == "NeuronNoValidatorPermit"
            assert await row(client, 1) == [[1, 65535]]

    asyncio.run(scenario())


def test_the_owner_of_a_subnet_needs_neither_permit_nor_stake(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, strict=True, tempo=200)
        async with opened(path, clock) as client:
            owner, miner = keys("owner"), keys("miner")
            netuid = (await client.execute(bt.RegisterSubnet(), owner)).data["netuid"]
            await register(client, miner, netuid)
            clock.blocks(100)
            weights = bt.SetWeights(netuid=netuid, weights={1: 1.0})
            assert (await client.execute(weights, owner.hotkey)).success
            assert (await client.weights.weights(netuid)) == {0: {1: 1.0}}
            refused = await refusal(client, miner, netuid=netuid, dests=[0], weights=[1])
            assert refused == "NotEnoughStakeToSetWeights"
            item = ("SubtensorModule", "ValidatorPermit")
            assert await client.query(item, [netuid]) == [False, False]
            clock.blocks(100)
            assert await client.query(item, [netuid]) == [True, False]  # with the first epoch

    asyncio.run(scenario())


def test_strict_makes_a_new_validator_wait_from_its_registration(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, strict=True, tempo=20)
        async with opened(path, clock) as client:
            validator, _ = await neurons(client, 2)
            await stake(client, validator, 10)
            weights = bt.SetWeights(netuid=NETUID, weights={1: 1.0})
            clock.blocks(99)
            with pytest.raises(bt.ChainError, match="Retry in ~1 blocks") as caught:
                await client.execute(weights, validator.hotkey)
            assert caught.value.code is bt.ErrorCode.RATE_LIMITED
            clock.blocks(1)
            result = await client.execute(weights, validator.hotkey)
            assert result.success
            assert any(e["event"]["event_id"] == "WeightsSet" for e in result.events)
            assert await column(client, "last_update") == [101, 1]
            clock.blocks(99)
            assert await refusal(client, validator, dests=[1], weights=[1]) == (
                "SettingWeightsTooFast"
            )
            clock.blocks(1)
            assert await refusal(client, validator, dests=[1], weights=[1]) is None

    asyncio.run(scenario())


def test_an_argument_of_the_wrong_shape_is_no_call(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock), clock) as client:
            for weights in ([1, 65536], [1, -1], [1, True], [0.5, 1], (1, 2), "12"):
                with pytest.raises(bt.ChainError, match="is not a list of u16"):
                    await refusal(client, keys("one"), weights=weights)

    asyncio.run(scenario())


# Commit-reveal ------------------------------------------------------------------------------------


def test_where_weights_are_committed_the_sdk_commits_and_nothing_is_revealed(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        switches = {"commit_reveal_weights_enabled": True, "weights_rate_limit": 5}
        path = created(tmp_path / "c.sqlite", clock, tempo=20, hyperparameters=switches)
        async with opened(path, clock) as client:
            validator, _ = await neurons(client, 2)
            await stake(client, validator, 10)
            clock.blocks(1)
            weights = bt.SetWeights(netuid=NETUID, weights={1: 1.0})
            result = await client.execute(weights, validator.hotkey)
            assert result.success
            assert result.data["reveal_round"] > 0
            ((epoch, (commit,)),) = (await client.weights.timelocked_weight_commits(NETUID)).items()
            assert epoch == 0
            assert commit["hotkey"] == validator.hotkey.ss58_address
            assert (commit["commit_block"], commit["reveal_round"]) == (
                2,
                result.data["reveal_round"],
            )
            assert await refusal(client, validator) == "CommitRevealEnabled"
            assert await client.weights.weights(NETUID) == {}
            assert await column(client, "last_update") == [2, 0]
            calls = bt.calls.SubtensorModule

            async def refused(who: Keys = validator, version: int = 4, netuid: int = NETUID) -> Any:
                call = calls.commit_timelocked_mechanism_weights(
                    netuid=netuid,
                    mecid=0,
                    commit=b"x",
                    reveal_round=1,
                    commit_reveal_version=version,
                )
                return error_name(await client.submit_call(call, who.hotkey))

            assert await refused(netuid=99) == "MechanismDoesNotExist"
            assert await refused(version=3) == "IncorrectCommitRevealVersion"
            assert await refused(keys("stranger")) == "HotKeyNotRegisteredInSubNet"
            assert await refused() == "CommittingWeightsTooFast"
            # Two epochs later the first commitment can no longer be revealed and is dropped.
            clock.blocks(20)
            assert await refused() is None
            clock.blocks(20)
            assert await refused() is None
            assert sorted(await client.weights.timelocked_weight_commits(NETUID)) == [1, 2]

    asyncio.run(scenario())


def test_a_hotkey_has_ten_commitments_at_most_and_none_where_they_are_off(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        call = bt.calls.SubtensorModule.commit_timelocked_weights(
            netuid=NETUID, commit=b"x", reveal_round=1, commit_reveal_version=4
        )
        switches = {"commit_reveal_weights_enabled": True}
        path = created(tmp_path / "on.sqlite", clock, hyperparameters=switches)
        async with opened(path, clock) as client:
            (validator,) = await neurons(client, 1)
            names = [
                error_name(await client.submit_call(call, validator.hotkey)) for _ in range(11)
            ]
            assert names == [None] * 10 + ["TooManyUnrevealedCommits"]
        async with opened(created(tmp_path / "off.sqlite", clock), clock) as client:
            (validator,) = await neurons(client, 1)
            result = await client.submit_call(call, validator.hotkey)
            assert error_name(result) == "CommitRevealDisabled"

    asyncio.run(scenario())


# Epochs -------------------------------------------------------------------------------------------


def test_an_epoch_turns_weights_into_incentive_and_emission(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, tempo=20)
        async with opened(path, clock) as client:
            validator, *_ = await neurons(client, 4)
            await stake(client, validator, 10)
            clock.blocks(1)
            weights = bt.SetWeights(netuid=NETUID, weights={1: 1, 2: 2, 3: 1})
            assert (await client.execute(weights, validator.hotkey)).success
            assert await column(client, "incentive") == [0, 0, 0, 0]
            clock.blocks(19)
            shares = [0, 0.25, 0.5, 0.25]
            assert await column(client, "incentive") == pytest.approx(shares, abs=2e-5)
            assert await column(client, "consensus") == pytest.approx(shares, abs=2e-5)
            assert await column(client, "dividends") == [1, 0, 0, 0]
            # 0.82 alpha per block for 20 blocks, one half for the validator.
            metagraph = await client.subnets.metagraph(NETUID, commitments=False)
            assert metagraph is not None
            emission = [neuron.emission.rao / 1e9 for neuron in metagraph.neurons]
            assert emission == pytest.approx([8.2, 2.05, 4.1, 2.05], abs=1e-3)
            # It is a figure to read: no stake has grown.
            assert [neuron.total_stake.amount for neuron in metagraph.neurons] == [10, 0, 0, 0]
            full = await client.neurons.all(NETUID, lite=False)
            assert [neuron.raw["incentive"] for neuron in full] == [0, 16383, 32767, 16383]
            assert full[0].raw["weights"] == [[1, 32768], [2, 65535], [3, 32768]]

    asyncio.run(scenario())


def test_a_uid_that_changed_hands_earns_nothing_of_its_predecessors_weights(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(
            tmp_path / "c.sqlite",
            clock,
            tempo=20,
            max_uids=3,
            hyperparameters={"immunity_period": 10},
        )
        async with opened(path, clock) as client:
            validator, _, _ = await neurons(client, 3)
            await stake(client, validator, 10)
            clock.blocks(1)
            weights = bt.SetWeights(netuid=NETUID, weights={1: 1, 2: 9})
            assert (await client.execute(weights, validator.hotkey)).success
            clock.blocks(20)
            assert await column(client, "incentive") == pytest.approx([0, 0.1, 0.9], abs=2e-5)
            assert (await register(client, keys("newcomer"))).success  # takes the lowest emission
            assert await client.neurons.uid(keys("newcomer").hotkey.ss58_address, NETUID) == 1
            assert await row(client, 0) == [[1, 0], [2, 65535]]
            clock.blocks(20)
            assert await column(client, "incentive") == [0, 0, 1]

    asyncio.run(scenario())


def test_the_successor_of_a_validator_does_not_inherit_its_weights(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(
            tmp_path / "c.sqlite", clock, max_uids=2, hyperparameters={"immunity_period": 10}
        )
        async with opened(path, clock) as client:
            validator, _ = await neurons(client, 2)
            await stake(client, validator, 10)
            assert await refusal(client, validator, dests=[1], weights=[1]) is None
            clock.blocks(10)
            assert (await register(client, keys("newcomer"))).success
            assert await client.neurons.uid(keys("newcomer").hotkey.ss58_address, NETUID) == 0
            assert await row(client, 0) is None

    asyncio.run(scenario())


def test_a_silent_validator_loses_its_vote_with_the_activity_cutoff(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        # Two tempos: the runtime counts the cutoff in thousandths of a tempo.
        cutoff = {"activity_cutoff_factor": 2000}
        path = created(tmp_path / "c.sqlite", clock, tempo=20, hyperparameters=cutoff)
        async with opened(path, clock) as client:
            validator, _ = await neurons(client, 2)
            await stake(client, validator, 10)
            clock.blocks(1)
            assert await refusal(client, validator, dests=[1], weights=[1]) is None
            clock.blocks(39)
            assert await column(client, "incentive") == [0, 1]  # the epoch at block 41
            clock.blocks(20)
            assert await column(client, "incentive") == [0, 0]
            assert await column(client, "active") == [0, 0]

    asyncio.run(scenario())


def test_strict_gives_permits_only_to_stake_above_the_threshold(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, strict=True, tempo=20)
        async with opened(path, clock) as client:
            enough, less = await neurons(client, 2)
            assert (await stake(client, enough, 1)).success
            assert (await stake(client, less, 0.99)).success
            clock.blocks(20)
            assert await permits(client) == [True, False]

    asyncio.run(scenario())
