"""Configuration: precedence, spellings, every refusal with its source, and the README's script."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mapreduce import __version__
from mapreduce.config import (
    AxonConfig,
    ChainConfig,
    LoggingConfig,
    MinerConfig,
    PeerConfig,
    UpdateConfig,
    ValidatorConfig,
    WalletConfig,
    all_config,
    available_memory_bytes,
    bot_config,
    miner_config,
    peer_config,
    run_cli,
    validator_config,
)
from mapreduce.config.options import OPTIONS, options_of
from mapreduce.errors import ChainUnavailable, ConfigError

EXAMPLE = Path(__file__).parents[2] / "example.validator.config.json"
ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def miner(*argv, env=None, available=64 * 2**30):
    return miner_config(argv, env or {}, available_bytes=lambda: available)


def validator(*argv, env=None, file=None):
    if file is not None:
        text = file if isinstance(file, str) else json.dumps(file)
        Path("validator.config.json").write_text(text)
    return validator_config(argv, env or {})


# Defaults and precedence.


def test_defaults():
    assert miner() == MinerConfig(memory_limit_bytes=32 * 2**30)
    assert validator() == ValidatorConfig()
    assert peer_config([], {}) == PeerConfig()
    config = validator()
    assert config.chain == ChainConfig(network="finney", endpoint=None, netuid=10)
    assert config.axon == AxonConfig(ip="0.0.0.0", port=8091)
    assert config.max_bandwidth_bits_per_s == 10737418240
    assert (config.join_timeout_s, config.window_bytes, config.frame_bytes) == (60, 2**22, 2**20)
    assert config.updates == UpdateConfig(level="no", every_s=3600.0, delay_s=1800.0)
    assert config.logging == LoggingConfig(level="info", logging_dir=None)


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default():
    file, env = {"subtensor.network": "local"}, {"BT_NETWORK": "test"}
    assert validator().chain.network == "finney"
    assert validator(file=file).chain.network == "local"
    assert validator(file=file, env=env).chain.network == "test"
    assert validator("--network", "archive", file=file, env=env).chain.network == "archive"


def test_an_empty_environment_variable_is_unset():
    assert miner(env={"BT_NETWORK": "", "BT_WALLET": ""}) == miner()


@pytest.mark.parametrize("key", [key for key, option in OPTIONS.items() if option.alias])
def test_both_spellings_of_a_flag_mean_the_same(key):
    values = {
        "subtensor.network": "test",
        "subtensor.chain_endpoint": "ws://node:9944",
        "axon.ip": "::1",
        "axon.external_ip": "203.0.113.7",
        "logging.logging_dir": "logs",
        "validator.audit_budget": "0.5",
    }
    option = OPTIONS[key]
    switch = key in ("logging.info", "logging.debug", "logging.trace")
    value = [] if switch else [values.get(key, "65536" if "bytes" in key else "77")]
    read = next(
        reader
        for role, reader in (("peer", peer_config), ("validator", validator_config))
        if key in options_of(role)
    )
    dotted, alias = read([option.flag, *value], {}), read([option.alias, *value], {})
    assert dotted == alias
    assert key == "logging.info" or dotted != read([], {})


def test_flags_written_with_an_equals_sign():
    assert miner("--netuid=3", "--axon.port=9000").axon.port == 9000


# Chain, wallet, axon, logging.


def test_a_chain_endpoint_overrides_the_network():
    chain = miner("--network", "test", "--subtensor.chain_endpoint", "ws://node:9944").chain
    assert chain.address == "ws://node:9944"
    assert miner("--network", "test").chain.address == "test"


def test_a_network_by_flag_is_not_redirected_by_an_endpoint_of_the_file():
    config = validator("--network", "test", file={"subtensor.chain_endpoint": "ws://old:1"})
    assert config.chain.address == "test"
    assert "ws://old:1" in config.warnings[0]
    assert "flag --network" in config.warnings[0]


@pytest.mark.parametrize(
    ("argv", "address"),
    [([], "ws://node:1"), (["--network", "local"], "ws://node:1"), (["--network=test"], "test")],
)
def test_the_endpoint_of_the_environment_is_that_of_the_local_network(argv, address):
    config = miner(*argv, env={"BT_CHAIN_ENDPOINT": "ws://node:1"})
    assert config.chain.address == address
    assert bool(config.warnings) == (address == "test")


@pytest.mark.parametrize(
    "network",
    ["local", "embedded", "embedded:/tmp/a b.db", "ws://[::1]:9944", "wss://h.example:443/x"],
)
def test_networks(network):
    assert miner("--subtensor.network", network).chain.network == network


@pytest.mark.parametrize(
    ("argv", "env", "expected"),
    [
        ([], {"BT_WALLET": "c/h"}, ("c", "h")),
        ([], {"BT_WALLET": "c", "BT_WALLET_HOTKEY": "k"}, ("c", "k")),
        (["--wallet.hotkey", "k"], {"BT_WALLET": "c/h"}, ("c", "k")),
        (["--wallet.name", "x"], {"BT_WALLET": "c/h"}, ("x", "default")),
        (["--wallet.name", "x/y"], {"BT_WALLET_HOTKEY": "k"}, ("x", "y")),
    ],
)
def test_a_wallet_may_be_named_with_its_hotkey(argv, env, expected):
    wallet = miner(*argv, env=env).wallet
    assert (wallet.name, wallet.hotkey) == expected


def test_one_source_may_not_name_two_hotkeys():
    with pytest.raises(ConfigError, match="BT_WALLET_HOTKEY"):
        miner(env={"BT_WALLET": "c/h", "BT_WALLET_HOTKEY": "k"})


def test_the_wallet_path_comes_from_the_environment_too():
    assert miner(env={"BT_WALLET_PATH": "/keys"}).wallet.path == "/keys"


def test_the_axon_takes_ipv6_with_or_without_brackets():
    axon = miner("--axon.ip", "[::]", "--external-ip", "2001:DB8::1", "--external-port", "80").axon
    assert axon == AxonConfig(ip="::", external_ip="2001:db8::1", external_port=80)


@pytest.mark.parametrize(
    ("argv", "level"),
    [
        ([], "trace"),
        (["--logging.info"], "info"),
        (["--debug"], "debug"),
        (["--debug", "--trace"], "trace"),
    ],
)
def test_the_level_is_the_most_talkative_of_the_strongest_source(argv, level):
    file = {"logging.trace": True, "logging.debug": True, "logging.logging_dir": "logs"}
    assert validator(*argv, file=file).logging == LoggingConfig(
        level=level, logging_dir=Path("logs")
    )


# Miner and validator.


@pytest.mark.parametrize(
    ("text", "limit_bytes"),
    [
        ("512MB", 512 * 10**6),
        ("4GiB", 4 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("17179869184", 2**34),
        ("17179869184B", 2**34),
    ],
)
def test_the_memory_limit_understands_units(text, limit_bytes):
    assert miner("--miner.memory_limit", text).memory_limit_bytes == limit_bytes


def test_a_memory_limit_beyond_what_is_there_warns():
    config = miner("--miner.memory_limit=4GiB", available=2**30)
    assert config.memory_limit_bytes == 4 * 2**30
    assert "1073741824" in config.warnings[0]


def test_the_memory_of_a_container_counts(tmp_path):
    machine = available_memory_bytes(tmp_path)  # no such files: no limit
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("40000000\n")
    assert machine > 60_000_000
    assert available_memory_bytes(tmp_path) == 60_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 60_000_000


def test_the_example_file_works_once_it_is_edited():
    example = json.loads(EXAMPLE.read_text())
    example |= {"wallet.name": "cold", "wallet.hotkey": "hot"}
    example["benchmark_hotkeys"][2:4] = [ALICE, BOB]
    config = validator(file=example)
    assert config.chain == ChainConfig(network="local", netuid=10)
    assert config.wallet == WalletConfig(name="cold", hotkey="hot")
    assert config.benchmark_hotkeys == (ALICE, BOB)
    assert config.updates.level == "patch"


def test_hotkeys_by_flag_are_separated_by_commas():
    assert validator("--benchmark_hotkeys", f"{ALICE}, {BOB},").benchmark_hotkeys == (ALICE, BOB)


def test_a_smaller_window_takes_the_default_frame_with_it():
    assert validator("--validator.window_bytes", "64KiB").frame_bytes == 65536


def test_all_is_a_validator_and_a_miner_with_one_identity():
    Path("validator.config.json").write_text('{"auto_update": "minor", "miner.max_jobs": 3}')
    first, second = all_config(["--axon.port", "9000"], {}, available_bytes=lambda: 2**40)
    assert (first.updates.level, second.max_jobs) == ("minor", 3)
    assert first.updates == second.updates
    assert (first.chain, first.wallet, first.axon) == (second.chain, second.wallet, second.axon)


def test_only_validators_read_the_default_file():
    Path("validator.config.json").write_text('{"netuid": 3}')
    assert miner().chain.netuid == 10
    assert miner("--config", "validator.config.json").chain.netuid == 3
    assert peer_config([], {}).chain.netuid == 10


# Old flags, help, errors, scripts.


def test_flags_of_older_versions_warn_and_are_skipped_with_their_values():
    config = miner(
        *["--subtensor._mock", "--neuron.name", "m1", "--netuid", "7", "--no_prompt"],
        *["--neuron.vpermit_tao_limit", "-1", "--logging.record_log", "--blacklist.x=1"],
        *["--port.range", "9000", "9300", "--axon.max_workers", "8", "--debug"],
    )
    assert (config.chain.netuid, config.logging.level) == (7, "debug")
    assert len(config.warnings) == 8
    assert "embedded" in config.warnings[0]


def test_every_neuron_can_update_itself_and_a_script_cannot():
    level = ["--auto_update", "notify", "--auto_update.delay", "0"]
    bot = bot_config(level, {})
    assert bot == PeerConfig(updates=UpdateConfig(level="notify", delay_s=0.0))
    assert miner(*level).updates == validator(*level).updates == bot.updates
    script = peer_config(["--auto_update", "patch"], {})
    assert script.updates.level == "no"
    assert "option of neurons" in script.warnings[0]


def test_a_miner_is_told_whom_to_ask():
    config = miner("--axon.lookup_url", "https://example.org/ip", "--miner.no_speedtest")
    assert (config.axon.lookup_url, config.speedtest) == ("https://example.org/ip", False)
    mini = miner("--miner.speedtest_mini", "http://127.0.0.1:8080/mini")
    assert (mini.speedtest, mini.speedtest_mini) == (True, "http://127.0.0.1:8080/mini")


@pytest.mark.parametrize(
    "read", [miner_config, validator_config, all_config, bot_config, peer_config]
)
def test_help_needs_nothing_and_tells_all(read, capsys):
    Path("validator.config.json").write_text("broken")
    with pytest.raises(SystemExit) as caught:
        read(["--help"], {})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options_of(read.__name__.removesuffix("_config")).values():
        assert option.flag in text
        assert option.env is None or option.env in text
    assert "default: 10" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        miner("--version")
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_script_keeps_its_flags_and_may_define_ours():
    parser = argparse.ArgumentParser()
    parser.add_argument("--validator.uid", type=int, default=4)
    parser.add_argument("--netuid", type=int, default=10)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--debug", default="the script's own")
    for _ in range(2):  # nothing sticks to the parser
        config = peer_config(
            ["--netuid", "12", "--rank", "2", "--network", "local"], {}, parser=parser
        )
        assert (config.validator_uid, config.chain.netuid, config.args.rank) == (4, 12, 2)
        assert vars(config.args)["validator.uid"] == 4
        assert (config.args.debug, config.logging.level) == ("the script's own", "info")
    assert parser.parse_args([]).netuid == 10
    Path("c.json").write_text('{"netuid": 13}')
    assert peer_config(["--config", "c.json"], {}, parser=parser).args.netuid == 13


def test_errors_end_the_process_with_one_line(capsys):
    for argv, code in ((["--netu", "3"], 2), ([], 0)):
        with pytest.raises(SystemExit) as caught:
            run_cli(lambda argv=argv: miner(*argv) and None)
        assert caught.value.code == code
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown flag --netu, did you mean --netuid? (see --help)"
    ]

    def fail():
        raise ChainUnavailable("no answer\nfrom the chain")

    with pytest.raises(SystemExit) as caught:
        run_cli(fail)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: no answer from the chain\n"


def test_configuration_imports_neither_torch_nor_bittensor():
    code = (
        "import sys, mapreduce.config, mapreduce.logs; "
        "assert not {'torch', 'bittensor', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
