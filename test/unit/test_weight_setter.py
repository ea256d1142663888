"""When weights are set: news, the chain's rate limit, failures, and who gets none."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mapreduce import __version__
from mapreduce.chain.metagraph import Metagraph, Neuron
from mapreduce.chain.weights import WeightsClock, WeightsSet, read_weights
from mapreduce.errors import ChainUnavailable, InvalidArgument, NotRegistered, Refused
from mapreduce.services import weights as module
from mapreduce.services.neuron import Directory
from mapreduce.services.weights import RETRY_S, WeightSetter, version_key
from mapreduce.store.database import Database
from mapreduce.store.history import History
from test.unit.test_chain_support import (
    NETUID,
    FakeClock,
    created,
    isolated,  # noqa: F401
    keys,
    opened,
    register,
    stake,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NOW = 1_700_000_000.0
OWN = "own"


class Chain:
    """The clock, the metagraph, and what the chain answers to weights."""

    def __init__(self) -> None:
        self.now = NOW
        self.hotkeys = [OWN, "a", "b", "c"]  # by uid
        self.wait_blocks = 0
        self.errors: list[Exception] = []
        self.read_error: Exception | None = None
        self.reads = 0
        self.vectors: list[dict[int, float]] = []
        self.planned: list[dict[int, float]] = []
        self.version_keys: set[int] = set()

    def time(self) -> float:
        return self.now

    async def metagraph(self, max_age_s: float) -> Metagraph:
        neurons = (
            Neuron(uid, hotkey, "cold", None, None, 0.0, False)
            for uid, hotkey in enumerate(self.hotkeys)
            if hotkey
        )
        return Metagraph(1, 1, tuple(neurons))

    async def read_weights_clock(self, client: object, netuid: int, uid: int) -> WeightsClock:
        self.reads += 1
        assert self.hotkeys[uid] == OWN
        if self.read_error is not None:
            raise self.read_error
        return WeightsClock(
            netuid=netuid,
            uid=uid,
            block=1000,
            last_update_block=1000 + self.wait_blocks - 100,
            rate_limit_blocks=100,
            tempo_blocks=360,
            blocks_to_epoch=1,
            permit=True,
            commit_reveal=False,
            min_allowed=1,
            block_time_s=12.0,
        )

    async def set_weights(
        self,
        client: object,
        key: object,
        netuid: int,
        weights: Mapping[int, float],
        *,
        version_key: int,
    ) -> WeightsSet:
        self.version_keys.add(version_key)
        if self.errors:
            raise self.errors.pop(0)
        self.vectors.append(dict(weights))
        return WeightsSet(block=1001, extrinsic_id="1001-0001", commit_reveal=False)

    async def plan_weights(
        self,
        client: object,
        key: object,
        netuid: int,
        weights: Mapping[int, float],
        *,
        version_key: int,
    ) -> dict[int, int]:
        if self.errors:
            raise self.errors.pop(0)
        self.planned.append(dict(weights))
        return dict.fromkeys(weights, 65535)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    made = Chain()
    monkeypatch.setattr(module, "time", made)
    for name in ("read_weights_clock", "set_weights", "plan_weights"):
        monkeypatch.setattr(module, name, getattr(made, name))
    return made


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with Database.open(tmp_path / "validator.sqlite") as opened_file:
        yield History(opened_file)


def setter_of(chain: Chain, history: History, *, dry_run: bool = False) -> WeightSetter:
    key = SimpleNamespace(ss58_address=OWN)
    fake = cast("Any", chain)
    return WeightSetter(fake, cast("Any", key), 1, fake, history, dry_run=dry_run)


def ask(setter: WeightSetter, **weights: float) -> None:
    asyncio.run(setter.set_if_due(weights))


def attempts(history: History) -> dict[str, str]:
    """The newest reason by result, of all results that there have been."""
    results = ("set", "dry run", "refused", "unreachable")
    found = {result: history.last_weights(cast("Any", result)) for result in results}
    return {result: last.reason for result, last in found.items() if last is not None}


def test_a_releases_number_orders_as_its_version_does() -> None:
    assert version_key("1.2.3") == 10_203
    versions = ["0.0.1", "0.1.0", "0.1.99", "0.2.0", "1.0.0", "1.10.0", "2.0.0"]
    numbers = [version_key(version) for version in versions]
    assert numbers == sorted(set(numbers))


# News ---------------------------------------------------------------------------------------------


def test_weights_are_set_by_uid_and_recorded(chain: Chain, history: History) -> None:
    ask(setter_of(chain, history), a=0.25, c=0.75)
    assert chain.vectors == [{1: 0.25, 3: 0.75}]
    assert chain.version_keys == {version_key(__version__)}
    last = history.last_weights()
    assert last is not None
    assert (last.at, last.block, last.result, last.reason) == (NOW, 1001, "set", "")
    assert json.loads(last.vector_json) == {"1": 0.25, "3": 0.75}


def test_what_was_set_last_is_not_set_again_in_whichever_order_it_comes(
    chain: Chain, history: History
) -> None:
    setter = setter_of(chain, history)
    ask(setter, a=0.25, c=0.75)
    chain.now += 10_000
    ask(setter, c=0.75, a=0.25)
    ask(setter_of(chain, history), a=0.25, c=0.75)  # another process
    assert len(chain.vectors) == 1
    assert chain.reads == 1


def test_other_weights_are_news_and_so_are_the_same_after_a_window(
    chain: Chain, history: History
) -> None:
    setter = setter_of(chain, history)
    history.close_window(7, NOW - 1, {}, {})
    ask(setter, a=0.25, c=0.75)
    ask(setter, a=0.25, c=0.75)
    assert len(chain.vectors) == 1
    ask(setter, a=0.5, c=0.5)
    assert len(chain.vectors) == 2
    chain.now += 5
    history.close_window(8, chain.now, {}, {})
    chain.now += 1
    ask(setter, a=0.5, c=0.5)
    ask(setter, a=0.5, c=0.5)
    assert chain.vectors == [{1: 0.25, 3: 0.75}, {1: 0.5, 3: 0.5}, {1: 0.5, 3: 0.5}]


def test_a_refusal_does_not_make_the_old_weights_news(chain: Chain, history: History) -> None:
    setter = setter_of(chain, history)
    ask(setter, a=1.0)
    chain.errors = [Refused("no", code="x")]
    ask(setter, b=1.0)
    chain.now += 10_000
    ask(setter, a=1.0)
    assert chain.vectors == [{1: 1.0}]


# Who gets none ------------------------------------------------------------------------------------


def test_the_own_uid_is_left_out_and_the_others_share_its_part(
    chain: Chain, history: History
) -> None:
    ask(setter_of(chain, history), own=0.5, a=0.125, b=0.375)
    assert chain.vectors == [{1: 0.25, 2: 0.75}]


def test_uid_0_is_a_miner_like_any_other(chain: Chain, history: History) -> None:
    chain.hotkeys = ["a", OWN, "b"]
    ask(setter_of(chain, history), a=0.25, b=0.75)
    assert chain.vectors == [{0: 0.25, 2: 0.75}]


def test_who_is_not_registered_any_more_is_dropped(chain: Chain, history: History) -> None:
    chain.hotkeys[2] = ""
    ask(setter_of(chain, history), a=0.125, b=0.5, c=0.375)
    assert chain.vectors == [{1: 0.25, 3: 0.75}]


def test_who_takes_over_a_uid_does_not_inherit_its_weight(chain: Chain, history: History) -> None:
    setter = setter_of(chain, history)
    ask(setter, a=0.5, b=0.5)
    chain.hotkeys[1] = "newcomer"
    ask(setter, a=0.5, b=0.5)
    assert chain.vectors[-1] == {2: 1.0}
    chain.hotkeys.append("a")  # it has come back under another uid
    ask(setter, a=0.5, b=0.5)
    assert chain.vectors[-1] == {2: 0.5, 4: 0.5}


@pytest.mark.parametrize(
    "weights",
    [{}, {"a": 0.0, "b": 0.0}, {"unknown": 1.0}, {OWN: 1.0}, {"a": math.nan}],
    ids=["none", "zeros", "unregistered", "own", "nan"],
)
def test_all_zero_is_never_set(
    chain: Chain, history: History, caplog: pytest.LogCaptureFixture, weights: dict[str, float]
) -> None:
    setter = setter_of(chain, history)
    for _ in range(3):
        ask(setter, **weights)
        chain.now += 10_000
    assert (chain.vectors, chain.planned, attempts(history)) == ([], [], {})
    alarms = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(alarms) == 1  # and not one per second
    ask(setter, a=1.0)
    ask(setter, **weights)
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2
    assert chain.vectors == [{1: 1.0}]


# The rate limit -----------------------------------------------------------------------------------


def test_the_rate_limit_is_waited_for_without_asking_the_chain_meanwhile(
    chain: Chain, history: History
) -> None:
    setter = setter_of(chain, history)
    chain.wait_blocks = 5
    ask(setter, a=1.0)
    assert attempts(history) == {}  # to wait is no failure
    chain.wait_blocks = 0
    chain.now += 59.9
    ask(setter, a=1.0)
    assert (chain.reads, chain.vectors) == (1, [])
    chain.now += 0.1
    ask(setter, a=0.5, b=0.5)  # what is newest by then
    assert chain.vectors == [{1: 0.5, 2: 0.5}]


def test_a_wait_for_the_rate_limit_does_not_lengthen_the_pause_of_a_failure(
    chain: Chain, history: History
) -> None:
    setter = setter_of(chain, history)
    chain.wait_blocks = 1
    for _ in range(5):
        ask(setter, a=1.0)
        chain.now += 12
    chain.wait_blocks = 0
    chain.errors = [Refused("no", code="x")]
    ask(setter, a=1.0)
    chain.now += RETRY_S[0]
    ask(setter, a=1.0)
    assert chain.vectors == [{1: 1.0}]


# Failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (Refused("the chain says no", code="x"), "refused"),
        (InvalidArgument("the chain says no"), "refused"),
        (ChainUnavailable("the chain says no"), "unreachable"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_failure_is_recorded_and_tried_again(
    chain: Chain, history: History, error: Exception, result: str, dry_run: bool
) -> None:
    setter = setter_of(chain, history, dry_run=dry_run)
    chain.errors = [error]
    ask(setter, a=1.0)
    assert attempts(history) == {result: "the chain says no"}
    chain.now += RETRY_S[0] - 0.1
    ask(setter, a=1.0)
    assert chain.reads == 1
    chain.now += 0.1
    ask(setter, a=1.0)
    assert len(chain.planned if dry_run else chain.vectors) == 1


def test_the_pauses_double_up_to_the_longest_and_begin_anew_after_a_success(
    chain: Chain, history: History
) -> None:
    setter = setter_of(chain, history)
    chain.read_error = ChainUnavailable("no answer")
    tried = []

    async def keep_asking() -> None:
        for _ in range(240):
            reads = chain.reads
            await setter.set_if_due({"a": 1.0})
            if chain.reads > reads:
                tried.append(chain.now)
            chain.now += 15

    asyncio.run(keep_asking())
    pauses = [after - before for before, after in pairwise(tried)]
    assert pauses == [15, 30, 60, 120, 240, 480, 900, 900]
    chain.read_error = None
    chain.now += RETRY_S[1]
    ask(setter, a=1.0)
    assert chain.vectors == [{1: 1.0}]
    chain.errors = [Refused("no", code="x")]
    ask(setter, b=1.0)
    chain.now += RETRY_S[0]
    ask(setter, b=1.0)
    assert chain.vectors[-1] == {2: 1.0}


def test_a_chain_that_does_not_answer_when_it_is_asked_is_a_failure(
    chain: Chain, history: History
) -> None:
    chain.read_error = ChainUnavailable("no answer")
    ask(setter_of(chain, history), a=1.0)
    assert attempts(history) == {"unreachable": "no answer"}


def test_a_validator_that_is_not_registered_any_more_says_so(
    chain: Chain, history: History
) -> None:
    chain.hotkeys[0] = "another"
    setter = setter_of(chain, history)
    ask(setter, a=1.0)
    assert attempts(history) == {"refused": "this hotkey is not registered any more"}
    assert chain.reads == 0
    chain.hotkeys.append(OWN)
    chain.now += RETRY_S[0]
    ask(setter, a=1.0)
    assert chain.vectors == [{1: 1.0}]


def test_a_uid_lost_since_the_metagraph_was_read_is_a_failure_as_any_other(
    chain: Chain, history: History
) -> None:
    chain.read_error = NotRegistered("no hotkey holds uid 0")
    ask(setter_of(chain, history), a=1.0)
    assert attempts(history) == {"refused": "no hotkey holds uid 0"}


def test_a_reason_is_cut_to_what_the_store_keeps(chain: Chain, history: History) -> None:
    chain.errors = [Refused("x" * 1000, code="x")]
    ask(setter_of(chain, history), a=1.0)
    assert attempts(history) == {"refused": "x" * 256}


# Dry run ------------------------------------------------------------------------------------------


def test_a_dry_run_plans_and_records_and_sets_nothing(chain: Chain, history: History) -> None:
    setter = setter_of(chain, history, dry_run=True)
    ask(setter, a=0.5, b=0.5)
    ask(setter, a=0.5, b=0.5)
    assert (chain.planned, chain.vectors) == ([{1: 0.5, 2: 0.5}], [])
    assert attempts(history) == {"dry run": "neuron.disable_set_weights"}
    last = history.last_weights("dry run")
    assert last is not None
    assert (last.block, json.loads(last.vector_json)) == (1000, {"1": 0.5, "2": 0.5})


def test_what_was_only_planned_is_still_to_be_set(chain: Chain, history: History) -> None:
    ask(setter_of(chain, history, dry_run=True), a=1.0)
    ask(setter_of(chain, history), a=1.0)
    assert chain.vectors == [{1: 1.0}]
    ask(setter_of(chain, history, dry_run=True), a=1.0)
    assert len(chain.planned) == 1


def test_a_dry_run_waits_for_the_rate_limit_too(chain: Chain, history: History) -> None:
    chain.wait_blocks = 1
    setter = setter_of(chain, history, dry_run=True)
    ask(setter, a=1.0)
    assert chain.planned == []
    chain.wait_blocks = 0
    chain.now += 12
    ask(setter, a=1.0)
    assert chain.planned == [{1: 1.0}]


# On a chain ---------------------------------------------------------------------------------------


def test_on_an_embedded_chain_weights_arrive_wait_and_are_replaced(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(module, "time", SimpleNamespace(time=clock))
    own, first, second = keys("own"), keys("first"), keys("second")

    async def scenario() -> None:
        path = created(tmp_path / "c.sqlite", clock, hyperparameters={"weights_rate_limit": 10})
        async with opened(path, clock) as client:
            for wallet in (own, first, second):
                assert (await register(client, wallet)).success
            assert (await stake(client, own, 10)).success
            clock.blocks(1)
            directory = Directory(client, NETUID)
            setter = WeightSetter(client, own.hotkey, NETUID, directory, history, dry_run=False)
            names = [wallet.hotkey.ss58_address for wallet in (first, second)]
            await setter.set_if_due(dict(zip(names, (0.25, 0.75), strict=True)))
            assert await read_weights(client, NETUID, 0) == pytest.approx(
                {1: 0.25, 2: 0.75}, abs=1e-4
            )
            last = history.last_weights()
            assert last is not None
            assert last.block > 0
            # Other ones have to wait for the chain, and are set when it takes them.
            await setter.set_if_due({names[0]: 1.0})
            clock.blocks(9)
            await setter.set_if_due({names[0]: 1.0})
            assert history.last_weights() == last
            clock.blocks(2)
            await setter.set_if_due({names[0]: 1.0})
            assert await read_weights(client, NETUID, 0) == {1: 1.0}
            assert attempts(history) == {"set": ""}

    asyncio.run(scenario())
