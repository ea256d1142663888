"""A validator that is killed at any moment, again and again: no window that it had closed is lost,
and the chain never holds weights that its scores do not give."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from mapreduce.chain import open_chain
from mapreduce.chain.weights import read_weights
from mapreduce.core.scoring import from_json
from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.local import LocalSubnet
from mapreduce.store.database import Database
from mapreduce.store.history import History
from mapreduce.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

KILLS = 20
WINDOW_S = 3.0
MOST_S = 2 * WINDOW_S  # that a validator lives after it was ready
SETTING_S = 0.008  # that it takes about to set weights
PATIENCE_S = 60.0  # until weights are on the chain
ROUNDING = 2 / (2**16 - 1)  # a chain keeps 16 bits of each weight's ratio to the largest
LIMITS = {"miner-2": 60e6}  # else fair weights would look like those of a validator without scores
FLAGS = (
    *("--scoring.window_s", f"{WINDOW_S:g}"),
    *("--scoring.ramp_windows", "1"),
    *("--benchmark.seconds", "0.3"),
    *("--max_bandwidth", "200000000"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What a dead validator has left, in its file and on the chain; weights are by uid."""

    windows: dict[int, float]  # and when each was closed
    measured: dict[str, int]  # windows that each standing rests on
    set_at: float
    set_last: dict[int, float]  # as recorded
    due: list[dict[int, float]]  # what the newest scores give: set perhaps, and not recorded
    on_chain: dict[int, float]


def chain_weights(subnet: LocalSubnet) -> dict[int, float]:
    async def read() -> dict[int, float]:
        async with open_chain(subnet.network) as client:
            return await read_weights(client, subnet.netuid, subnet.validator_uid)

    return asyncio.run(read())


def look(subnet: LocalSubnet) -> Left:
    uids = {neuron.hotkey: neuron.uid for neuron in subnet.metagraph().neurons}
    with Database.open(subnet.state_path) as database:
        assert database.execute("PRAGMA quick_check") == [("ok",)]
        history = History(database)
        windows = dict(database.execute("SELECT window, at FROM windows ORDER BY at"))
        standings = {hotkey: from_json(text) for hotkey, text in history.standings().items()}
        last = history.last_weights()
        due = [
            by_uid(database, uids, window, banned)
            for window in list(windows)[-2:]
            for banned in ((), Ledger(database).banned(time.time(), ScoringConfig().ban_s))
        ]
    return Left(
        windows=windows,
        measured={hotkey: standing.windows_measured for hotkey, standing in standings.items()},
        set_at=0.0 if last is None else last.at,
        set_last={int(u): w for u, w in json.loads(last.vector_json).items()} if last else {},
        due=due,
        on_chain=chain_weights(subnet),
    )


def by_uid(
    database: Database, uids: dict[str, int], window: int, banned: Collection[str]
) -> dict[int, float]:
    """The weights that one window's scores give."""
    weights = {}
    for hotkey, score in History(database).scores(window).items():
        assert score.weight == 0 or json.loads(score.components_json)["gate"] > 0
        if score.weight > 0 and hotkey not in banned:
            weights[uids[hotkey]] = score.weight
    return {uid: weight / sum(weights.values()) for uid, weight in weights.items()}


def same(left: dict[int, float], right: dict[int, float]) -> bool:
    return left.keys() == right.keys() and all(
        abs(left[uid] - right[uid]) <= ROUNDING for uid in left
    )


def closings(log: Path) -> set[int]:
    """The windows that validators have reported as closed."""
    return {int(window) for window in re.findall(r"window closed window=(\d+)", log.read_text())}


def check(before: Left, left: Left, reported: set[int]) -> bool:
    """Fails if anything was lost; whether the last weights are on the chain and not recorded."""
    assert reported <= left.windows.keys()
    assert before.windows.items() <= left.windows.items()
    assert max(left.windows) == list(left.windows)[-1]  # it never went back
    assert before.measured.keys() <= left.measured.keys()
    assert all(left.measured[hotkey] >= count for hotkey, count in before.measured.items())
    assert left.set_at >= before.set_at
    assert left.on_chain
    older = list(left.windows.values())[-2:][0]  # of the newest two, by which `due` goes
    if left.set_at > older:
        assert any(same(left.set_last, due) for due in left.due), left
    if same(left.on_chain, left.set_last):
        return False
    assert any(same(left.on_chain, due) for due in left.due), left
    return True


def wait_until(subnet: LocalSubnet, happened: Callable[[], bool], every_s: float = 0.2) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it has stopped working"
        live(subnet, every_s)


def live(subnet: LocalSubnet, seconds: float) -> None:
    assert subnet.validator is not None
    subnet.validator.wait(seconds)
    subnet.check()  # it lives, and so do all others


def live_until_closing(subnet: LocalSubnet, log: Path) -> None:
    before = closings(log)
    wait_until(subnet, lambda: closings(log) > before, every_s=0.0)


def convict(path: Path, hotkey: str, now: float) -> None:
    with Ledger.open(path) as ledger:
        assert ledger.add_proof(
            "a lie",
            kind="F1",
            role="miner",
            culprit=hotkey,
            job="j",
            step=1,
            segment=0,
            data=b"evidence",
            now=now,
        )


@pytest.mark.parametrize(
    "kills", [KILLS // 20, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["once", "all"]
)
def test_a_validator_killed_at_random_goes_on_from_what_it_had(tmp_path: Path, kills: int) -> None:
    rng = random.Random(kills)
    restarts_s, unrecorded = [], 0
    log_path = tmp_path / "validator.log"
    with LocalSubnet(2, bots=1, directory=tmp_path, validator_flags=FLAGS, limits=LIMITS) as subnet:
        liar = subnet.wallet("miner-2").hotkey.ss58_address
        honest, lying = subnet.miner_uids
        caught_at = float("inf")
        wait_until(subnet, lambda: bool(chain_weights(subnet)))
        before: Left | None = None
        for kill in range(1, kills + 1):
            if kill % 2:
                live(subnet, rng.uniform(0.0, MOST_S))
            else:  # between the end of a window and the note that its weights are set
                live_until_closing(subnet, log_path)
                time.sleep(rng.uniform(0.0, SETTING_S))  # `live` looks every 10 ms
            assert subnet.validator is not None
            subnet.validator.kill()
            left = look(subnet)
            unrecorded += check(before or left, left, closings(log_path))
            # 1 : 1 are the weights of a validator that knows nothing; these are paid for 89 (what
            # the bots can measure) and for 60 Mbit/s.
            assert left.on_chain[honest] > 1.25 * left.on_chain.get(lying, 0.0)
            assert left.set_at < caught_at or left.on_chain.keys() == {honest}
            if kill == (kills + 1) // 2:
                caught_at = time.time()
                convict(subnet.state_path, liar, caught_at)
            before = left
            begun = time.monotonic()
            subnet.restart_validator()
            restarts_s.append(time.monotonic() - begun)
        wait_until(subnet, lambda: chain_weights(subnet) == {honest: 1.0})
    assert before is not None
    print(
        f"{kills} kills: {len(before.windows)} windows closed, none lost; ready again in "
        f"{statistics.median(restarts_s):.2f} s, at most {max(restarts_s):.2f} s; "
        f"{unrecorded} times weights were on the chain and not yet in the file"
    )
