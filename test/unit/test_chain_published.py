"""What neurons publish on the embedded chain beside their axon: certificates and commitments."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import bittensor as bt
import pytest

from test.unit.test_chain_support import (
    NETUID,
    FakeClock,
    created,
    error_name,
    isolated,  # noqa: F401
    keys,
    opened,
    register,
    serve,
)

if TYPE_CHECKING:
    from pathlib import Path

    from test.unit.test_chain_support import Keys


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def serve_tls(
    client: bt.Client, wallet: Keys, certificate: bytes, ip: str = "10.0.0.1"
) -> bt.ExtrinsicResult:
    intent = bt.ServeAxonTls(netuid=NETUID, ip=ip, port=8091, certificate="0x" + certificate.hex())
    return await client.execute(intent, wallet.hotkey)


async def certificate_of(client: bt.Client, wallet: Keys) -> Any:
    item = ("SubtensorModule", "NeuronCertificates")
    return await client.query(item, [NETUID, wallet.hotkey.ss58_address])


async def commit(client: bt.Client, wallet: Keys, *fields: Any) -> bt.ExtrinsicResult:
    info = {"fields": [list(fields)]}
    call = bt.calls.Commitments.set_commitment(netuid=NETUID, info=info)
    return await client.submit_call(call, wallet.hotkey, signer="hotkey")


# Certificates -------------------------------------------------------------------------------------


def test_a_certificate_stands_beside_the_axon(tmp_path: Path, clock: FakeClock) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock), clock) as client:
            one = keys("one")
            await register(client, one)
            assert await certificate_of(client, one) is None
            key = bytes(range(64))
            assert (await serve_tls(client, one, b"\x05" + key)).success
            stored = {"algorithm": 5, "public_key": "0x" + key.hex()}
            assert await certificate_of(client, one) == stored
            metagraph = await client.subnets.metagraph(NETUID)
            assert metagraph is not None
            assert metagraph.neurons[0].axon == "10.0.0.1:8091"
            # Serving without one leaves it; one that is too long, or none, is not stored.
            assert (await serve(client, one, "10.0.0.2")).success
            for odd in (bytes(66), b""):
                assert (await serve_tls(client, one, odd, "10.0.0.3")).success
                assert await certificate_of(client, one) == stored

    asyncio.run(scenario())


def test_both_ways_to_serve_share_the_rules_and_the_rate_limit(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock, strict=True), clock) as client:
            one = keys("one")
            assert error_name(await serve_tls(client, one, b"12")) == "HotKeyNotRegisteredInNetwork"
            await register(client, one)
            assert error_name(await serve_tls(client, one, b"12", "::1")) == "InvalidIpAddress"
            assert await certificate_of(client, one) is None
            assert (await serve(client, one, "10.0.0.1")).success
            clock.blocks(49)
            assert error_name(await serve_tls(client, one, b"12")) == "ServingRateLimitExceeded"
            clock.blocks(1)
            assert (await serve_tls(client, one, b"12")).success
            assert error_name(await serve(client, one, "10.0.0.1")) == "ServingRateLimitExceeded"

    asyncio.run(scenario())


# Commitments --------------------------------------------------------------------------------------


def test_a_commitment_can_be_read_wherever_the_sdk_shows_one(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock), clock) as client:
            one = keys("one")
            hotkey = one.hotkey.ss58_address
            assert error_name(await commit(client, one, {"Raw2": b"hi"})) == (
                "AccountNotAllowedCommit"
            )
            await register(client, one)
            clock.blocks(2)
            assert (await commit(client, one, {"Raw5": b"hello"}, {"Sha256": bytes(32)})).success
            (shown,) = await client.read("commitments", netuid=NETUID)
            assert (shown["hotkey"], shown["uid"], shown["block"]) == (hotkey, 0, 3)
            assert shown["commitment"] == "hello\nsha256:0x" + "00" * 32
            assert shown["status"] == "plain"
            metagraph = await client.subnets.metagraph(NETUID)
            assert metagraph is not None
            assert metagraph.neurons[0].commitment is not None
            assert metagraph.neurons[0].commitment.value == shown["commitment"]
            single = await client.identity.commitment(NETUID, hotkey)
            assert single is not None
            assert (single.data, single.deposit.rao) == ("hello", 0)
            block = await client.block_info()
            assert block is not None
            arguments = block.extrinsics[-1]["call"]["call_args"]
            assert {entry["name"]: entry["value"] for entry in arguments}["info"] == {
                "fields": [[{"Raw5": "0x" + b"hello".hex()}, {"Sha256": "0x" + "00" * 32}]]
            }
            # The next one replaces it.
            assert (await commit(client, one, {"Raw1": b"x"}, "ResetBondsFlag")).success
            assert (await client.subnets.commitments(NETUID))[hotkey].value == "x"

    asyncio.run(scenario())


def test_a_commitment_has_three_fields_and_a_quota_from_epoch_to_epoch(
    tmp_path: Path, clock: FakeClock
) -> None:
    async def scenario() -> None:
        async with opened(created(tmp_path / "c.sqlite", clock, tempo=20), clock) as client:
            one, other = keys("one"), keys("other")
            await register(client, one)
            await register(client, other)
            empty = {"Raw0": b""}
            assert error_name(await commit(client, one, *[empty] * 4)) == (
                "TooManyFieldsInCommitmentInfo"
            )
            big = [{"BigRaw": bytes(512)}] * 3
            assert (await commit(client, one, *big)).success
            assert (await commit(client, one, *big)).success  # 3072 of 3100 bytes
            assert error_name(await commit(client, one, empty)) == "SpaceLimitExceeded"
            assert (await commit(client, other, empty)).success
            clock.blocks(20)
            names = [error_name(await commit(client, one, empty)) for _ in range(32)]
            assert names == [None] * 31 + ["SpaceLimitExceeded"]  # each counts 100 bytes

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "fields",
    [
        [[{"Raw3": b"four"}]],
        [[{"Raw129": bytes(129)}]],
        [[{"BigRaw": bytes(513)}]],
        [[{"Sha256": bytes(31)}]],
        [[{"TimelockEncrypted": {"encrypted": b"x", "reveal_round": 1}}]],
        [[{"Raw1": "x"}]],
        [[{"Raw1": b"x", "Raw2": b"xx"}]],
        [["Surprise"]],
        [{"Raw1": b"x"}],
        [[], []],
        [],
        {"Raw1": b"x"},
    ],
)
def test_fields_of_another_shape_are_no_call(tmp_path: Path, fields: Any) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "c.sqlite") as client:
            for info in ({"fields": fields}, fields):
                call = bt.calls.Commitments.set_commitment(netuid=NETUID, info=info)
                with pytest.raises(bt.ChainError, match="nothing timelocked"):
                    await client.compose(call)

    asyncio.run(scenario())
