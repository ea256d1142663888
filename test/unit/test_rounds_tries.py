"""A round: what is tried again, who fails in the end, and what becomes of a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mapreduce.services.rounds import MAX_TRIES
from mapreduce.services.slots import STILL_RISING
from test.unit.test_rounds_support import (
    FAILED,
    MEASURED,
    RATE,
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

# Once more ----------------------------------------------------------------------------------------


def test_who_has_spoilt_a_slot_is_tried_again_alone_after_the_others(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", "d")
    subnet.bots = ["x", "y"]
    rounds = rounds_of(subnet, history)
    subnet.says["a"] = [VOID, MEASURED]
    assert run(rounds, subnet)
    assert [len(slot) for slot in subnet.slots] == [2, 2, 1]
    assert subnet.slots[-1] == ["a"]
    first, second = rows_of(history, "a")
    assert (first.outcome, first.reason) == ("void", "a bot stopped; measured once more")
    assert first.bytes == 7  # they were spent
    assert second.outcome == "measured"


def test_who_is_tried_again_joins_no_slot_of_others(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b", "c", "d")
    subnet.bots = ["x", "y", "z"]
    for name in "abcd":
        subnet.says[name] = [VOID, MEASURED]
    assert run(rounds_of(subnet, history), subnet)
    assert [len(slot) for slot in subnet.slots] == [3, 1, 1, 1, 1, 1]
    assert len({name for slot in subnet.slots[:2] for name in slot}) == 4


def test_a_miner_that_gives_only_void_while_others_are_measured_has_failed(
    subnet: Subnet, history: History
) -> None:
    subnet.add("spoiler", "b", "c")
    subnet.says["spoiler"] = [VOID]
    rounds = rounds_of(subnet, history)
    assert run(rounds, subnet)
    assert outcomes_of(history, "spoiler") == ["void"] * MAX_TRIES + ["failed"]
    last = rows_of(history, "spoiler")[-1]
    assert last.reason == "nothing measured in 4 tries: a bot stopped"
    assert (last.bytes, last.goodput_bytes_per_s) == (7, 0.0)
    assert outcomes_of(history, "b") == outcomes_of(history, "c") == ["measured"]


def test_alone_in_a_subnet_it_may_be_the_bots_and_void_stays_void(
    subnet: Subnet, history: History
) -> None:
    subnet.add("only")
    subnet.says["only"] = [VOID]
    assert not run(rounds_of(subnet, history), subnet)
    assert outcomes_of(history, "only") == ["void"] * (MAX_TRIES + 1)


def test_where_nobody_is_measured_nobody_fails(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b")
    subnet.says.update(a=[VOID], b=[VOID])
    assert not run(rounds_of(subnet, history), subnet)
    assert {row.outcome for row in history.measurements(0.0)} == {"void"}
    # What was measured in an earlier window says nothing of the bots now.
    subnet.says.update(a=[MEASURED], b=[MEASURED])
    rounds = rounds_of(subnet, history)
    assert run(rounds, subnet, window=1)
    subnet.says.update(a=[VOID], b=[VOID])
    run(rounds, subnet, window=2)
    assert {row.outcome for row in history.measurements(0.0) if row.window == 2} == {"void"}


def test_a_miner_measured_itself_in_the_round_is_no_witness_against_itself(
    subnet: Subnet, history: History
) -> None:
    subnet.add("only")
    fast = replace(MEASURED, goodput_bytes_per_s=3 * RATE)
    subnet.says["only"] = [fast, VOID]
    run(rounds_of(subnet, history), subnet)
    assert outcomes_of(history, "only") == ["void"] * (MAX_TRIES + 1)


def test_a_miner_that_turns_out_faster_is_measured_again_at_what_it_showed(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a")
    subnet.says["a"] = [
        replace(MEASURED, goodput_bytes_per_s=2.5 * RATE),
        replace(MEASURED, goodput_bytes_per_s=STILL_RISING * 2.5 * RATE),  # not above: enough
    ]
    rounds = rounds_of(subnet, history)
    assert run(rounds, subnet)
    assert subnet.told == [[RATE], [2.5 * RATE]]
    first, second = rows_of(history, "a")
    assert (first.outcome, first.goodput_bytes_per_s) == ("void", 0.0)
    assert first.reason == "faster than its estimate; measured once more"
    assert (second.outcome, second.goodput_bytes_per_s) == ("measured", 5 * RATE)
    assert rounds.estimates == {"a": 5 * RATE}


def test_one_that_rises_without_end_keeps_what_its_last_try_showed(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a")
    shown = [replace(MEASURED, goodput_bytes_per_s=3.0**n * RATE) for n in range(1, 6)]
    subnet.says["a"] = list(shown)
    assert run(rounds_of(subnet, history), subnet)
    assert outcomes_of(history, "a") == ["void"] * MAX_TRIES + ["measured"]
    assert rows_of(history, "a")[-1].goodput_bytes_per_s == 3.0**4 * RATE


def test_a_failure_stands_and_halves_the_estimate(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b")
    subnet.says["a"] = subnet.says["b"] = [FAILED]
    rounds = rounds_of(subnet, history)
    rounds.estimates["a"] = 8 * RATE
    assert run(rounds, subnet)
    assert outcomes_of(history, "a") == outcomes_of(history, "b") == ["failed"]
    assert rounds.estimates == {"a": 4 * RATE}  # b never worked: it may be absent and is let be


def test_a_void_says_nothing_of_an_estimate(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b")
    subnet.says["a"] = [VOID]
    rounds = rounds_of(subnet, history)
    rounds.estimates["a"] = 2 * RATE
    assert run(rounds, subnet)
    assert rounds.estimates["a"] == 2 * RATE


def test_who_has_no_room_is_asked_again_and_its_estimate_stays(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b")
    subnet.says["a"] = [replace(FAILED, reason="all 4 jobs are taken")]
    subnet.busy = {"a"}
    rounds = rounds_of(subnet, history)
    rounds.estimates["a"] = 2 * RATE
    assert run(rounds, subnet)
    assert outcomes_of(history, "a") == ["void"] * MAX_TRIES + ["failed"]
    assert rounds.estimates["a"] == 2 * RATE


def test_who_has_room_at_the_second_try_is_measured(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b")
    subnet.says["a"] = [FAILED, MEASURED]
    subnet.busy = {"a"}

    def room() -> None:
        subnet.busy = {"a"} if sum("a" in slot for slot in subnet.slots) == 1 else set()

    subnet.during = room
    assert run(rounds_of(subnet, history), subnet)
    assert outcomes_of(history, "a") == ["void", "measured"]


def test_a_reason_is_cut_to_what_the_store_keeps(subnet: Subnet, history: History) -> None:
    subnet.add("a")
    subnet.says["a"] = [replace(FAILED, reason="x" * 1000)]
    run(rounds_of(subnet, history), subnet)
    assert rows_of(history, "a")[0].reason == "x" * 256


# Clusters -----------------------------------------------------------------------------------------


def test_a_cluster_is_measured_at_once_even_with_more_miners_than_bots(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", coldkey="one")
    subnet.add("d")
    assert run(rounds_of(subnet, history), subnet)
    assert sorted(sorted(slot) for slot in subnet.slots) == [["a", "b", "c"], ["d"]]
    # Each shows what it has beside the others: that is its part already.
    assert {row.goodput_bytes_per_s for row in history.measurements(0.0)} == {RATE}


def test_a_cluster_of_which_one_is_not_done_is_measured_together(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", coldkey="one")
    assert run(rounds_of(subnet, history), subnet, done=frozenset({"a"}))
    assert [sorted(slot) for slot in subnet.slots] == [["a", "b"]]


def test_neighbours_without_an_axon_make_nobody_a_cluster(subnet: Subnet, history: History) -> None:
    subnet.add("a", "validator", "b")
    # The validator shares its owner with the one and its network with the other.
    subnet.neurons["a"] = replace(subnet.neurons["a"], coldkey="one")
    subnet.neurons["validator"] = replace(subnet.neurons["validator"], coldkey="one", port=None)
    subnet.neurons["b"] = replace(subnet.neurons["b"], ip="10.0.1.77")
    assert run(rounds_of(subnet, history), subnet)
    assert sorted(subnet.slots) == [["a"], ["b"]]


def test_who_has_failed_is_not_tried_again_with_its_cluster(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", coldkey="one")
    subnet.says.update(a=[FAILED], b=[VOID, MEASURED])
    assert run(rounds_of(subnet, history), subnet)
    assert [sorted(slot) for slot in subnet.slots] == [["a", "b", "c"], ["b", "c"]]
    assert outcomes_of(history, "a") == ["failed"]
    assert outcomes_of(history, "b") == ["void", "measured"]
    assert outcomes_of(history, "c") == ["void", "measured"]


def test_a_failure_in_a_cluster_that_is_clear_spoils_nobody(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", coldkey="one")
    subnet.says["a"] = [FAILED]
    assert run(rounds_of(subnet, history), subnet)
    assert len(subnet.slots) == 1
    assert outcomes_of(history, "b") == ["measured"]


def test_a_cluster_that_stays_unclear_is_measured_one_by_one_for_a_part_each(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", coldkey="one")
    subnet.says["a"] = [VOID]
    rounds = rounds_of(subnet, history)
    assert run(rounds, subnet)
    together, alone = subnet.slots[: MAX_TRIES + 1], subnet.slots[MAX_TRIES + 1 :]
    assert [sorted(slot) for slot in together] == [["a", "b", "c"]] * (MAX_TRIES + 1)
    assert sorted(alone) == [["a"], ["b"], ["c"]]
    for name in "bc":
        assert outcomes_of(history, name) == ["void"] * (MAX_TRIES + 1) + ["measured"]
        assert rows_of(history, name)[-1].goodput_bytes_per_s == pytest.approx(RATE / 3)
        assert rounds.estimates[name] == RATE  # what the next slot of it must be able to carry
    # It is no witness against itself, but its neighbours are.
    assert outcomes_of(history, "a") == ["void"] * (MAX_TRIES + 1) + ["failed"]


def test_a_cluster_that_only_rises_is_not_taken_apart(subnet: Subnet, history: History) -> None:
    subnet.add("a", "b", coldkey="one")
    for name in "ab":
        subnet.says[name] = [
            replace(MEASURED, goodput_bytes_per_s=3.0**n * RATE) for n in range(1, 6)
        ]
    assert run(rounds_of(subnet, history), subnet)
    assert [len(slot) for slot in subnet.slots] == [2] * (MAX_TRIES + 1)
    for name in "ab":
        assert rows_of(history, name)[-1].goodput_bytes_per_s == 3.0**4 * RATE


def test_the_parts_of_a_cluster_are_of_those_who_were_left(
    subnet: Subnet, history: History
) -> None:
    subnet.add("a", "b", "c", coldkey="one")
    subnet.says.update(a=[FAILED], b=[VOID] * (MAX_TRIES + 1) + [MEASURED])
    run(rounds_of(subnet, history), subnet)
    assert len(rows_of(history, "a")) == 1
    parts = [rows_of(history, name)[-1].goodput_bytes_per_s for name in "bc"]
    assert parts == pytest.approx([RATE / 2, RATE / 2])
