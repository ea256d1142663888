"""Two validators that know nothing of each other measure the same miners, each with its bots."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import TYPE_CHECKING

import pytest

from mapreduce.chain import open_chain
from mapreduce.chain.actions import add_stake, register_hotkey
from mapreduce.chain.wallets import create_wallet
from mapreduce.chain.weights import read_weights
from mapreduce.local import LocalSubnet
from mapreduce.local_chain import VALIDATOR_STAKE_TAO, WALLET, WALLETS
from mapreduce.processes import ChildProcess, stop_all

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = {"miner-1": 30e6, "miner-2": 60e6, "miner-3": 120e6}
FLAGS = (
    *("--scoring.window_s", "20"),
    *("--scoring.ramp_windows", "1"),
    *("--benchmark.seconds", "2"),
)
BOTS = 2
LEAST_COSINE = 0.99
PATIENCE_S = 240.0
SETTINGS = 4  # of weights by each, before they are compared: so many windows were measured


def second_validator(subnet: LocalSubnet) -> tuple[int, list[ChildProcess]]:
    """Registers and starts another validator and its bots; returns its uid and the processes."""
    wallets = str(subnet.directory / WALLETS)
    bots = [f"other-bot-{number}" for number in range(1, BOTS + 1)]
    hotkeys = [create_wallet(wallets, WALLET, name).hotkey.ss58_address for name in bots]

    async def register() -> int:
        wallet = create_wallet(wallets, WALLET, "other-validator")
        async with open_chain(subnet.network) as client:
            uid = await register_hotkey(client, wallet, subnet.netuid)
            await add_stake(client, wallet, subnet.netuid, VALIDATOR_STAKE_TAO)
        return uid

    uid = asyncio.run(register())
    state = ("--validator.state", str(subnet.directory / "other.sqlite"))
    axon = ("--axon.ip", "127.0.0.1", "--axon.port", "0")
    known = ("--benchmark_hotkeys", ",".join(hotkeys))
    children = [subnet._spawn("validator", "other-validator", (*axon, *state, *known, *FLAGS))]
    children[0].wait_ready(lambda: subnet._answers(uid), 30.0)
    own = ("--validator.uid", str(uid))
    children += [subnet._spawn("benchmark", name, own) for name in bots]
    return uid, children


def weights_of(subnet: LocalSubnet, uid: int) -> dict[int, float]:
    async def read() -> dict[int, float]:
        async with open_chain(subnet.network) as client:
            return await read_weights(client, subnet.netuid, uid)

    return asyncio.run(read())


def times_set(log: Path) -> int:
    return log.read_text().count("weights are set")


def cosine(left: dict[int, float], right: dict[int, float]) -> float:
    product = math.fsum(left.get(uid, 0.0) * right.get(uid, 0.0) for uid in left | right)
    return product / math.hypot(*left.values()) / math.hypot(*right.values())


@pytest.mark.slow
def test_two_validators_agree(tmp_path: Path) -> None:
    children: list[ChildProcess] = []
    with LocalSubnet(
        3, bots=BOTS, directory=tmp_path, limits=LIMITS, validator_flags=FLAGS
    ) as subnet:
        try:
            other, children = second_validator(subnet)
            deadline = time.monotonic() + PATIENCE_S
            logs = [tmp_path / "validator.log", tmp_path / "other-validator.log"]
            while min(map(times_set, logs)) < SETTINGS:
                assert time.monotonic() < deadline, "weights were not set often enough"
                subnet.check()
                time.sleep(1.0)
            both = [weights_of(subnet, uid) for uid in (subnet.validator_uid, other)]
        finally:
            stop_all(children)
    found = cosine(*both)
    print(f"cosine {found:.5f} of {json.dumps(both)}")
    assert found >= LEAST_COSINE
