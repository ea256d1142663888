"""A round: whose turn it is, who is measured with whom, and what it may take."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from mapreduce.core.scoring_config import ScoringConfig
from test.unit.test_rounds_support import (
    FAILED,
    MEASURED,
    NOW,
    RATE,
    SLOT_BYTES,
    SLOT_S,
    VOID,
    Subnet,
    made_subnet,  # noqa: F401
    opened_history,  # noqa: F401
    outcomes_of,
    rounds_of,
    rows_of,
    run,
)

if TYPE_CHECKING:
    from mapreduce.store.history import History

# Turns --------------------------------------------------------------------------------------------


def test_every_miner_has_one_turn_and_the_row_says_what_it_showed(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", "d", "e")
    assert run(rounds_of(subnet, history), subnet, window=5)
    assert sorted(subnet.slots) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    rows = history.measurements(0.0)
    assert {row.job for row in rows} == {f"job-{n}" for n in range(1, 6)}
    for row in rows:
        assert (row.window, row.outcome, row.reason) == (5, "measured", "")
        assert (row.goodput_bytes_per_s, row.latency_s) == (RATE, 0.02)
        assert (row.seconds, row.bytes) == (SLOT_S, SLOT_BYTES)


def test_the_turns_are_spread_over_the_window_and_all_fit_into_it(
    subnet: Subnet, history: History
) -> None:
    names = [f"m{n}" for n in range(20)]
    subnet.add(*names)
    subnet.slot_s = 2 * SLOT_S
    assert run(rounds_of(subnet, history), subnet, seconds=4320.0)
    assert len(subnet.slots) == 20
    gaps = [b - a - 2 * SLOT_S for a, b in pairwise(subnet.begun)]
    assert min(gaps) >= 0
    assert len({round(gap, 3) for gap in gaps}) > 15  # none follows from the one before
    assert subnet.begun[-1] - subnet.begun[0] > 4320 / 4
    assert subnet.now <= NOW + 4320


def test_the_order_of_the_turns_is_another_one_in_each_window(
    subnet: Subnet, history: History
) -> None:
    names = [f"m{n}" for n in range(10)]
    subnet.add(*names)
    rounds = rounds_of(subnet, history)
    for window in range(3):
        assert run(rounds, subnet, window=window)
    orders = [[name for (name,) in subnet.slots[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({tuple(order) for order in (names, *orders)}) == 4


def test_whoever_is_done_has_no_further_turn_and_counts_as_measured(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c")
    assert run(rounds_of(subnet, history), subnet, done=frozenset({"a", "c"}))
    assert subnet.slots == [["b"]]


def test_a_subnet_without_miners_is_never_whole(subnet: Subnet, history: History) -> None:
    assert not run(rounds_of(subnet, history), subnet)
    assert subnet.slots == []


def test_without_a_bot_the_round_ends_with_the_window(subnet: Subnet, history: History) -> None:
    subnet.add("a")
    subnet.bots = []
    assert not run(rounds_of(subnet, history), subnet, seconds=0.001)
    assert history.measurements(0.0) == []


def test_whose_turn_was_longest_ago_comes_first_and_whole_is_once_all_had_one(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", "d", "e")
    subnet.slot_s = SLOT_S
    rounds = rounds_of(subnet, history)
    wholes = [run(rounds, subnet, window=window, seconds=2 * SLOT_S) for window in range(5)]
    assert wholes == [False, False, True, True, True]
    assert len(subnet.slots) == 10
    order = [name for (name,) in subnet.slots]
    assert set(order[:5]) == set("abcde")
    assert set(order[5:7]) == set(order[:2])
    assert set(order[7:9]) == set(order[2:4])
    # A newcomer had none at all, and is next.
    subnet.add("new")
    assert not run(rounds, subnet, window=5, seconds=0.0)
    assert run(rounds, subnet, window=6, seconds=SLOT_S)
    assert subnet.slots[-1] == ["new"]


def test_a_miner_that_moves_is_measured_where_it_is_now(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b")

    def move() -> None:
        subnet.neurons = {
            name: replace(neuron, uid=neuron.uid + 7, port=9000)
            for name, neuron in subnet.neurons.items()
        }

    subnet.during = move
    run(rounds_of(subnet, history), subnet)
    ((before,), (after,)) = subnet.addresses
    assert (before.port, after.port) == (8091, 9000)
    assert after.uid >= 7


def test_a_miner_that_stops_serving_within_the_round_is_still_tried(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b")

    def leave() -> None:
        subnet.neurons = {}

    subnet.during = leave
    run(rounds_of(subnet, history), subnet)
    assert sorted(subnet.slots) == [["a"], ["b"]]


# Who is measured ----------------------------------------------------------------------------------


def test_a_banned_miner_is_left_out_and_nobody_waits_for_it(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c")
    subnet.banned_ones = {"b": "proof"}
    assert run(rounds_of(subnet, history), subnet)
    assert sorted(subnet.slots) == [["a"], ["c"]]
    assert rows_of(history, "b") == []


def test_a_banned_miner_does_not_fill_a_slot_nor_join_its_neighbours(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", coldkey="one")
    subnet.add("c")
    subnet.bots = ["x", "y", "z", "w"]
    subnet.banned_ones = {"b": "proof"}
    assert run(rounds_of(subnet, history), subnet)
    assert [sorted(slot) for slot in subnet.slots] == [["a", "c"]]


def test_a_silent_miner_is_measured_only_if_it_worked_before(
    subnet: Subnet, history: History
) -> None:
    subnet.add("stranger", "known", "here")
    subnet.silent = {"stranger", "known"}
    subnet.says["known"] = [FAILED]
    rounds = rounds_of(subnet, history)
    rounds.estimates["known"] = RATE
    assert run(rounds, subnet)
    assert sorted(subnet.slots) == [["here"], ["known"]]
    assert outcomes_of(history, "known") == ["failed"]


def test_who_worked_and_serves_no_axon_any_more_fails_once_per_window(
    subnet: Subnet, history: History
) -> None:
    subnet.add("gone", "here", "validator")
    for name in ("gone", "validator"):
        subnet.neurons[name] = replace(subnet.neurons[name], ip=None, port=None)
    rounds = rounds_of(subnet, history)
    rounds.estimates["gone"] = RATE
    assert run(rounds, subnet)
    (row,) = rows_of(history, "gone")
    assert (row.outcome, row.reason, row.goodput_bytes_per_s) == ("failed", "serves no axon", 0.0)
    assert rows_of(history, "validator") == []
    # A process that takes the window up again does not count it twice.
    run(rounds, subnet, done=frozenset({"gone", "here"}))
    assert outcomes_of(history, "gone") == ["failed"]
    run(rounds, subnet, window=1)
    assert outcomes_of(history, "gone") == ["failed", "failed"]


def test_to_be_absent_was_a_turn(subnet: Subnet, history: History) -> None:
    subnet.add("gone", "here")
    there = subnet.neurons["gone"]
    subnet.neurons["gone"] = replace(there, ip=None, port=None)
    rounds = rounds_of(subnet, history)
    rounds.estimates["gone"] = RATE
    assert run(rounds, subnet)
    subnet.neurons["gone"] = there
    assert run(rounds, subnet, window=1, seconds=0.0)
    assert subnet.slots == [["here"]]


# Packing ------------------------------------------------------------------------------------------


def test_a_slot_has_as_many_miners_as_bots_and_the_last_one_is_filled_up(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", "d")
    subnet.bots = ["x", "y", "z"]
    assert run(rounds_of(subnet, history), subnet)
    assert [len(set(slot)) for slot in subnet.slots] == [3, 3]
    assert {name for slot in subnet.slots for name in slot} == set("abcd")
    # What a filler shows counts too.
    assert len(history.measurements(0.0)) == 6


def test_a_filler_is_neither_tried_again_nor_fails_for_a_void(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c")
    subnet.bots = ["x", "y"]
    for name in "abc":  # whoever fills the second slot has had its turn
        subnet.says[name] = [MEASURED, VOID]
    assert run(rounds_of(subnet, history), subnet)
    first, second = subnet.slots
    (filler,) = set(first) & set(second)
    assert outcomes_of(history, filler) == ["measured", "void"]


def test_a_filler_that_fails_has_failed(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b", "c")
    subnet.bots = ["x", "y"]
    for name in "abc":
        subnet.says[name] = [MEASURED, FAILED]
    rounds = rounds_of(subnet, history)
    run(rounds, subnet)
    (filler,) = set(subnet.slots[0]) & set(subnet.slots[1])
    assert outcomes_of(history, filler) == ["measured", "failed"]
    assert rounds.estimates[filler] == RATE / 2


@pytest.mark.parametrize(("factor", "together"), [(4.0, True), (4.01, False)])
def test_only_miners_that_are_alike_share_a_slot(
    subnet: Subnet, history: History, factor: float, together: bool
) -> None:
    subnet.add("slow", "fast")
    subnet.bots = ["x", "y"]
    rounds = rounds_of(subnet, history)
    rounds.estimates.update(slow=RATE, fast=factor * RATE)
    subnet.says["fast"] = [replace(MEASURED, goodput_bytes_per_s=factor * RATE)]
    run(rounds, subnet)
    assert (len(subnet.slots) == 1) is together
    assert sum(map(len, subnet.slots)) == 2


@pytest.mark.parametrize(("spare", "together"), [(1.0, True), (0.99, False)])
def test_the_bots_can_outrun_all_the_miners_of_a_slot(
    subnet: Subnet, history: History, spare: float, together: bool
) -> None:
    subnet.add("a", "b")
    subnet.bots = ["x", "y", "z"]
    # Two at RATE, in and out, and the room that a measurement needs (FlashFlow).
    enough = 2 * RATE * ScoringConfig().capacity_ratio / 2
    subnet.limits = replace(subnet.limits, max_bytes_per_s=enough * spare)
    rounds = rounds_of(subnet, history)
    assert rounds.cap_bytes_per_s == pytest.approx(2 * RATE * spare)
    run(rounds, subnet)
    assert sorted(map(len, subnet.slots)) == ([2] if together else [1, 1])


def test_a_miner_that_the_bots_cannot_outrun_is_measured_all_the_same(
    subnet: Subnet, history: History
) -> None:
    subnet.add("giant")
    rounds = rounds_of(subnet, history)
    rounds.estimates["giant"] = 10 * rounds.cap_bytes_per_s
    assert run(rounds, subnet)
    assert subnet.slots == [["giant"]]


# Bytes --------------------------------------------------------------------------------------------


def test_what_a_window_may_take_is_not_passed_and_who_waited_is_next(
    subnet: Subnet, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    window_s = 8640.0  # a tenth of a day
    subnet.add("a", "b", "c")
    subnet.limits = replace(subnet.limits, bytes_per_day=10 * 2 * SLOT_BYTES)
    rounds = rounds_of(subnet, history, window_s=window_s)
    with caplog.at_level(logging.WARNING):
        assert not run(rounds, subnet, seconds=window_s)
    assert len(subnet.slots) == 2
    assert [r.message for r in caplog.records if "bytes_per_day" in r.message] != []
    (left,) = set("abc") - {name for (name,) in subnet.slots}
    assert rows_of(history, left) == []  # it waits, and has not failed
    subnet.now = NOW + 2 * window_s
    assert run(rounds, subnet, window=2, seconds=window_s)
    assert subnet.slots[2] == [left]
    assert len(subnet.slots) == 4


def test_a_full_budget_is_told_once_and_not_for_every_miner(
    subnet: Subnet, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    subnet.add("a", "b", "c", "d")
    subnet.limits = replace(subnet.limits, bytes_per_day=0)
    with caplog.at_level(logging.WARNING):
        assert not run(rounds_of(subnet, history), subnet)
    assert subnet.slots == []
    assert len([r for r in caplog.records if "bytes_per_day" in r.message]) == 1


def test_a_slot_too_large_for_a_window_is_taken_from_the_day_and_never_more_than_it(
    subnet: Subnet, history: History
) -> None:
    window_s = 8640.0
    subnet.add("a", "b")
    subnet.limits = replace(subnet.limits, bytes_per_day=3 * SLOT_BYTES)  # .3 slots a window
    rounds = rounds_of(subnet, history, window_s=window_s)
    per_window = []
    for window in range(24):
        subnet.now = NOW + window * (window_s + 1)
        before = len(subnet.slots)
        run(rounds, subnet, window=window, seconds=window_s)
        per_window.append(len(subnet.slots) - before)
        assert history.traffic_since(subnet.now - 86400) <= 3 * SLOT_BYTES
    assert max(per_window) == 1
    assert sum(per_window) >= 6
    assert min(len(rows_of(history, name)) for name in "ab") >= 2  # it is nobody's alone


def test_no_slot_is_planned_for_more_than_the_bots_can_move(
    subnet: Subnet, history: History
) -> None:
    subnet.add("giant")
    # An estimate beyond the bots must not need a budget that nothing could ever spend.
    subnet.limits = replace(
        subnet.limits, max_bytes_per_s=RATE / 2, bytes_per_day=int(SLOT_S * RATE)
    )
    rounds = rounds_of(subnet, history, window_s=86400.0)
    rounds.estimates["giant"] = 100 * RATE
    assert run(rounds, subnet)


def test_fillers_cost_no_miner_its_turn(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b", "c", "d")
    subnet.bots = ["x", "y", "z"]
    # Enough for each once, and not for the two that would fill the second slot.
    subnet.limits = replace(subnet.limits, bytes_per_day=4 * SLOT_BYTES)
    assert run(rounds_of(subnet, history, window_s=86400.0), subnet, seconds=86400.0)
