"""Configuration that cannot be used: every refusal names the key, the value and where it stood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapreduce.config import (
    AxonConfig,
    ChainConfig,
    LoggingConfig,
    MinerConfig,
    PeerConfig,
    ValidatorConfig,
    WalletConfig,
    miner_config,
    validator_config,
)
from mapreduce.errors import ConfigError

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--axon-port", "99999"], ["axon.port", "'99999'", "flag --axon-port", "0 to 65535"]),
        (["--axon.ip", "localhost"], ["axon.ip", "IPv4 or IPv6"]),
        (["--axon.external_ip", "0.0.0.0"], ["axon.external_ip", "others can dial"]),
        (["--axon.external_port", "0"], ["axon.external_port", "1 to 65535"]),
        (["--netuid", "-1"], ["netuid", "'-1'", "0 to 65535"]),
        (["--netuid", "1e1"], ["netuid", "whole number"]),
        (["--network", "finey"], ["subtensor.network", "'finey'", "embedded[:PATH]"]),
        (["--network", "ws://"], ["subtensor.network", "ws://HOST"]),
        (["--network", "embedded:"], ["subtensor.network"]),
        (["--chain-endpoint", "finney"], ["subtensor.chain_endpoint", "wss://HOST[:PORT]"]),
        (["--chain-endpoint", "ws://h:70000"], ["subtensor.chain_endpoint"]),
        (["--wallet.hotkey", "../x"], ["wallet.hotkey", "without slashes"]),
        (["--wallet.name", "<your miner wallet>"], ["wallet.name", "edit it"]),
        (["--miner.max_jobs", "0"], ["miner.max_jobs", "1 to 1024"]),
        (["--miner.memory_limit", "4G"], ["miner.memory_limit", "4MiB"]),
        (["--miner.memory_limit", "1MB"], ["miner.memory_limit", "from 16777216"]),
        (["--miner.memory_limit", f"{'9' * 400}.5TB"], ["miner.memory_limit"]),
        (["--config", "nowhere.json"], ["nowhere.json", "No such file"]),
        (["--netu", "3"], ["--netu", "did you mean --netuid?"]),
        (["--subtensor.netwrk=x"], ["unknown flag --subtensor.netwrk,", "--subtensor.network?"]),
        (["--validator.uid", "3"], ["--validator.uid"]),
        (["stray"], ["'stray'"]),
        (["--netuid"], ["--netuid", "expected one argument"]),
        (["--neuron.disable_set_weights"], ["--neuron.disable_set_weights", "not supported"]),
    ],
)
def test_a_flag_that_cannot_be_used_is_refused(argv, parts):
    with pytest.raises(ConfigError) as caught:
        miner_config(argv, {})
    for part in parts:
        assert part in str(caught.value)


def test_an_environment_variable_that_cannot_be_used_is_named():
    with pytest.raises(ConfigError, match=r"'mars' from environment variable BT_NETWORK"):
        miner_config([], {"BT_NETWORK": "mars"})


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ({"netuid": "10"}, ["netuid", "'10'", "file validator.config.json", "whole number"]),
        ({"netuid": True}, ["netuid", "True"]),
        ({"netuid": 10.0}, ["netuid"]),
        ({"netuid": None}, ["netuid", "None"]),
        ({"max_bandwidth": 10}, ["max_bandwidth", "bits per second from 1000000"]),
        ({"auto_update": False}, ["auto_update", "False", '"no" turns it off', '"major"']),
        ({"auto_update": "true"}, ["auto_update", '"no" turns it off']),
        ({"auto_update": "weekly"}, ["auto_update", "'weekly'"]),
        ({"auto_update.every": 0}, ["auto_update.every", "above 0"]),
        ({"auto_update.delay": -1}, ["auto_update.delay", "from 0"]),
        ({"axon.lookup_url": "ftp://example.org"}, ["axon.lookup_url", "https://HOST"]),
        ({"axon.lookup_url": "http://"}, ["axon.lookup_url", "https://HOST"]),
        ({"benchmark_hotkeys": ALICE}, ["benchmark_hotkeys", "a list"]),
        ({"benchmark_hotkeys": {}}, ["benchmark_hotkeys", "a list"]),
        ({"benchmark_hotkeys": ["", ALICE[:-1] + "0"]}, ["entry 2", "ss58"]),
        ({"benchmark_hotkeys": [ALICE[:-2]]}, ["entry 1"]),
        ({"benchmark_hotkeys": [7]}, ["entry 1", "7"]),
        ({"benchmark_hotkeys": [ALICE, "", ALICE]}, ["entries 1 and 3", ALICE]),
        ({"validator.join_timeout": 0}, ["validator.join_timeout", "above 0"]),
        ('{"validator.join_timeout": NaN}', ["validator.join_timeout"]),
        ({"validator.window_bytes": 20000}, ["validator.window_bytes", "multiple of 16384"]),
        ({"validator.frame_bytes": 2**23}, ["frame_bytes = 8388608", "window_bytes = 4194304"]),
        ({"logging.debug": "yes"}, ["logging.debug", "true or false"]),
        ({"wallet.name": "your wallet name"}, ["wallet.name", "edit it"]),
        ({"wallet.hotkey": "your validator hotkey"}, ["wallet.hotkey", "edit it"]),
        ({"max_bandwith": 10**10}, ["'max_bandwith'", "did you mean max_bandwidth?"]),
        ({"subtensor": {"network": "local"}}, ['"subtensor.network"', "not nested"]),
        ({"validator.uid": 3}, ["'validator.uid'", "peer"]),
        ([], ["one JSON object"]),
        ('{"netuid": 1, "netuid": 2}', ["'netuid'", "twice"]),
        ('{\n  "netuid": 10,\n  oops\n}', ["validator.config.json", "line 3, column 3"]),
        ("[" * 100_000, ["validator.config.json"]),
        (f'{{"netuid": {"1" * 5000}}}', ["validator.config.json"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, parts):
    text = file if isinstance(file, str) else json.dumps(file)
    Path("validator.config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        validator_config([], {})
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_is_not_text_is_refused():
    Path("bad.json").write_bytes(b'{"netuid": \xff}')
    with pytest.raises(ConfigError, match=r"bad\.json is not UTF-8"):
        miner_config(["--config", "bad.json"], {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChainConfig(netuid=70000),
        lambda: ChainConfig(endpoint="finney"),
        lambda: WalletConfig(name="c/h"),
        lambda: AxonConfig(port=-1),
        lambda: LoggingConfig(level="loud"),
        lambda: MinerConfig(memory_limit_bytes=0),
        lambda: ValidatorConfig(frame_bytes=2**23),
        lambda: ValidatorConfig(benchmark_hotkeys=("nobody",)),
        lambda: PeerConfig(validator_uid=-1),
    ],
)
def test_the_dataclasses_check_themselves(make):
    with pytest.raises(ConfigError):
        make()
