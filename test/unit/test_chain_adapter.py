"""What the services see of a chain: names, wallets, the metagraph, errors that say what helps."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import bittensor as bt
import pytest

from mapreduce.chain import embedded_path, open_chain
from mapreduce.chain.actions import add_stake, register_hotkey
from mapreduce.chain.axons import serve_axon
from mapreduce.chain.metagraph import (
    Metagraph,
    Neuron,
    fetch_metagraph,
    parse_endpoint,
    register_command,
    require_registered,
)
from mapreduce.chain.wallets import create_wallet, load_wallet
from mapreduce.errors import ChainUnavailable, ConfigError, NotRegistered, Refused, WalletError
from test.unit.test_chain_support import (
    NETUID,
    FakeClock,
    created,
    isolated,  # noqa: F401
    keys,
    opened,
)

if TYPE_CHECKING:
    from pathlib import Path


# Names of networks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "endpoint", "message"),
    [
        ("finny", None, r"'finny' is unknown; allowed is finney, test, local, .*embedded\[:PATH\]"),
        ("embeddedx", None, "'embeddedx' is unknown"),
        ("embedded:", None, "a path must follow the colon"),
        ("embedded", "ws://127.0.0.1:9944", "an embedded chain has no endpoint"),
        ("finney", "127.0.0.1:9944", "'127.0.0.1:9944': allowed is a ws:// or wss:// address"),
        ("wss://", None, "'wss://' is unknown"),
    ],
)
def test_a_name_that_means_nothing_is_refused(
    network: str, endpoint: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_chain(network, endpoint=endpoint)


@pytest.mark.parametrize(
    ("network", "endpoint", "used"),
    [
        ("finney", None, "wss://entrypoint-finney.opentensor.ai:443"),
        ("ws://10.0.0.1:9944", None, "ws://10.0.0.1:9944"),
        ("local", "ws://10.0.0.1:9944", "ws://10.0.0.1:9944"),
        ("embedded:x.sqlite", None, "ws://embedded"),
    ],
)
def test_a_client_is_made_for_every_kind_of_network(
    network: str, endpoint: str | None, used: str
) -> None:
    assert open_chain(network, endpoint=endpoint).endpoint == used


def test_the_embedded_chain_has_a_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(embedded_path("embedded")) == "/home/somebody/.mapreduce/chain.sqlite"
    assert str(embedded_path("embedded:~/c.db")) == "/home/somebody/c.db"


def test_the_package_loads_bittensor_only_when_a_chain_is_opened() -> None:
    code = "import sys, mapreduce.chain; sys.exit('bittensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Wallets ------------------------------------------------------------------------------------------


def test_a_created_wallet_loads_and_its_mnemonic_is_shown_to_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = create_wallet(str(tmp_path), "miner")
    second = create_wallet(str(tmp_path), "miner", "hk2")
    loaded = load_wallet("miner", path=str(tmp_path), coldkey=True)
    assert loaded.hotkey.ss58_address == made.hotkey.ss58_address
    assert second.coldkeypub.ss58_address == made.coldkeypub.ss58_address
    assert second.hotkey.ss58_address != made.hotkey.ss58_address
    assert capfd.readouterr() == ("", "")
    with pytest.raises(WalletError, match="exists already"):
        create_wallet(str(tmp_path), "miner")


def test_a_hotkey_needs_no_coldkey_beside_it(tmp_path: Path) -> None:
    create_wallet(str(tmp_path), "miner")
    (tmp_path / "miner" / "coldkey").unlink()
    load_wallet("miner", path=str(tmp_path))
    with pytest.raises(WalletError, match="miner/coldkey; create the wallet with"):
        load_wallet("miner", path=str(tmp_path), coldkey=True)


def test_a_missing_wallet_says_how_to_create_it(tmp_path: Path) -> None:
    with pytest.raises(WalletError) as caught:
        load_wallet("miner", "hk", str(tmp_path))
    assert str(tmp_path / "miner" / "hotkeys" / "hk") in str(caught.value)
    assert "`btcli wallet create --wallet miner --wallet-hotkey hk --wallet-path" in str(
        caught.value
    )


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    create_wallet(str(tmp_path), "miner")
    (tmp_path / "miner" / "hotkeys" / "default").write_text("garbage")
    with pytest.raises(WalletError, match=r"hotkeys/default is no usable key file"):
        load_wallet("miner", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"wallet\.name"):
        load_wallet("a/b", "c", str(tmp_path))


@pytest.mark.slow  # the key derivation takes seconds by design
def test_an_encrypted_key_opens_with_its_password_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wallet = bt.Wallet("miner", "default", str(tmp_path))
    wallet.create_new_coldkey(use_password=False, suppress=True)
    wallet.create_new_hotkey(hotkey_password="right", suppress=True)
    with pytest.raises(WalletError, match="is encrypted; put its password in BT_WALLET_PASSWORD"):
        load_wallet("miner", path=str(tmp_path))
    monkeypatch.setenv("BT_WALLET_PASSWORD", "wrong")
    with pytest.raises(WalletError, match=r"wrong password for .*hotkeys/default"):
        load_wallet("miner", path=str(tmp_path))
    monkeypatch.delenv("BT_WALLET_PASSWORD")
    (tmp_path / "password").write_text("right\n")
    monkeypatch.setenv("BT_WALLET_PASSWORD_FILE", str(tmp_path / "password"))
    assert load_wallet("miner", path=str(tmp_path)).hotkey.ss58_address == (
        wallet.hotkey.ss58_address
    )


# The metagraph ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axon", "endpoint"),
    [
        ("1.2.3.4:8091", ("1.2.3.4", 8091)),
        ("[2001:db8::1]:80", ("2001:db8::1", 80)),
        (None, (None, None)),
        ("", (None, None)),
        ("1.2.3.4", (None, None)),
        ("1.2.3.4:0", (None, None)),
        ("1.2.3.4:65536", (None, None)),
        ("1.2.3.4:x", (None, None)),
        ("host:80", (None, None)),
    ],
)
def test_an_endpoint_is_parsed_or_ignored(
    axon: str | None, endpoint: tuple[str | None, int | None]
) -> None:
    assert parse_endpoint(axon) == endpoint


def test_neurons_are_found_by_uid_and_hotkey() -> None:
    neurons = tuple(
        Neuron(uid, hotkey, "cold", None, None, 0.0, False) for uid, hotkey in enumerate("abc")
    )
    metagraph = Metagraph(NETUID, 5, neurons)
    assert metagraph.by_hotkey("b") is neurons[1]
    assert metagraph.by_uid(2) is neurons[2]
    assert metagraph.by_hotkey("z") is metagraph.by_uid(9) is None


def test_the_services_view_of_a_neuron(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = FakeClock()
        async with opened(created(tmp_path / "chain.sqlite", clock), clock) as client:
            one = keys("one")
            assert await register_hotkey(client, one, NETUID) == 0
            await add_stake(client, one, NETUID, 12.5)
            clock.blocks(4)
            assert await serve_axon(client, one, NETUID, "2001:DB8::1", 8091)
            metagraph = await fetch_metagraph(client, NETUID)
            assert metagraph.block == 5
            assert metagraph.neurons == (
                Neuron(
                    uid=0,
                    hotkey=one.hotkey.ss58_address,
                    coldkey=one.coldkey.ss58_address,
                    ip="2001:db8::1",
                    port=8091,
                    stake_tao=12.5,
                    validator_permit=True,
                    registered_at_block=1,
                ),
            )

    asyncio.run(scenario())


def test_an_axon_is_published_only_when_it_changed(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = FakeClock()
        path = created(tmp_path / "chain.sqlite", clock, strict=True)
        async with opened(path, clock) as client:
            one = keys("one")
            await register_hotkey(client, one, NETUID)
            assert await serve_axon(client, one, NETUID, "10.0.0.1", 8091)
            assert not await serve_axon(client, one, NETUID, "10.0.0.1", 8091)
            with pytest.raises(Refused, match=r"ServingRateLimitExceeded\); wait for") as caught:
                await serve_axon(client, one, NETUID, "10.0.0.1", 8092)
            assert caught.value.code == "rate_limited"
            clock.blocks(50)
            assert await serve_axon(client, one, NETUID, "10.0.0.1", 8092)
            with pytest.raises(ConfigError, match="'example' is no IP address"):
                await serve_axon(client, one, NETUID, "example", 1)

    asyncio.run(scenario())


def test_refusals_say_why_and_what_helps(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = FakeClock()
        async with opened(created(tmp_path / "chain.sqlite", clock), clock) as client:
            one = keys("one")
            hotkey = one.hotkey.ss58_address
            for call in (
                fetch_metagraph(client, 99),
                register_hotkey(client, one, 99),
                require_registered(client, 99, hotkey, "x"),
            ):
                with pytest.raises(ConfigError, match="netuid = 99: there is no such subnet"):
                    await call
            with pytest.raises(NotRegistered, match=f"{hotkey} is not registered .*`do this`"):
                await require_registered(client, NETUID, hotkey, "do this")
            with pytest.raises(Refused, match="HotKeyNotRegisteredInNetwork") as unregistered:
                await serve_axon(client, one, NETUID, "10.0.0.1", 1)
            assert unregistered.value.code == "not_registered"
            await register_hotkey(client, one, NETUID)
            assert await require_registered(client, NETUID, hotkey, "x") == 0
            with pytest.raises(Refused, match="already registered on netuid 10 as uid 0"):
                await register_hotkey(client, one, NETUID)
            with pytest.raises(Refused, match=r"coldkey .* holds 9999\.9 TAO") as poor:
                await add_stake(client, one, NETUID, 10_000)
            assert poor.value.code == "insufficient_balance"

    asyncio.run(scenario())


def test_the_registering_command_fits_the_network() -> None:
    assert register_command("embedded:/tmp/c.db", 10, "m", "h") == (
        "python -m mapreduce.chain register --subtensor.network embedded:/tmp/c.db --netuid 10 "
        "--wallet.name m --wallet.hotkey h"
    )
    assert register_command("test", 99, "m", "h", wallet_path="~/w") == (
        "btcli subnets register --network test --netuid 99 --wallet m --wallet-hotkey h "
        "--wallet-path ~/w"
    )
    assert "--network ws://h:1 " in register_command("local", 1, "m", "h", endpoint="ws://h:1")


def test_a_closed_connection_is_a_chain_that_does_not_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "chain.sqlite") as client:
            pass
        with pytest.raises(ChainUnavailable, match="reading netuid 10: no answer from the chain"):
            await fetch_metagraph(client, NETUID)

    asyncio.run(scenario())
