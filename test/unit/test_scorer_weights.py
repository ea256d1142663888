"""A scorer hands weights on only while they are worth setting, and without whom it has caught."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mapreduce.errors import ChainUnavailable
from mapreduce.services.scorer import FRESH_STATE_S
from test.unit.test_scorer_support import (
    BEGIN,
    FAILED,
    MEASURED,
    VOID,
    WINDOW,
    WINDOW_S,
    World,
    close,
    in_window,
    made_world,  # noqa: F401
    opened_history,  # noqa: F401
    run,
    scorer_of,
    set_before,
)

if TYPE_CHECKING:
    from mapreduce.store.history import History


# When weights are set -----------------------------------------------------------------------------


def test_no_weights_are_set_before_every_miner_has_had_its_turn(
    world: World, history: History
) -> None:
    world.add("a")
    world.on_round = lambda window: history.add_slot([in_window(MEASURED, window)])
    run(scorer_of(world, history), world, False, False, True, False)
    first = world.set[0][0]
    assert first >= BEGIN + 3 * WINDOW_S  # the end of the third round
    # Once all had it, a later round that is too short takes nothing back.
    assert len(world.set) == WINDOW_S / world.pause_s  # all of the fourth
    assert all(weights == {"a": 1.0} for _, weights in world.set)


@pytest.mark.parametrize(
    ("result", "age_s", "sets"),
    [
        ("set", 10.0, True),
        ("dry run", 10.0, True),
        ("set", FRESH_STATE_S - 1, True),
        ("set", FRESH_STATE_S + 1, False),
        ("refused", 10.0, False),
        ("unreachable", 10.0, False),
        (None, 10.0, False),
    ],
)
def test_after_a_restart_weights_are_set_only_if_they_were_and_are_not_stale(
    world: World, history: History, result: str | None, age_s: float, sets: bool
) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    close(scorer_of(world, history))
    if result is not None:
        set_before(history, result)
    world.now = MEASURED.at + age_s
    run(scorer_of(world, history), world, False)
    assert bool(world.set) is sets


def test_a_failure_or_a_void_does_not_keep_scores_fresh(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    close(scorer_of(world, history))
    set_before(history)
    world.now = MEASURED.at + FRESH_STATE_S + 1
    window = math.floor(world.now / WINDOW_S)
    history.add_slot([in_window(FAILED, window - 1), in_window(VOID, window - 1)])
    run(scorer_of(world, history), world, True, True)
    assert world.set == []
    # With the first one measured they are fresh again.
    world.on_round = lambda window: history.add_slot([in_window(MEASURED, window)])
    run(scorer_of(world, history), world, False, False)
    assert world.set != []


def test_bots_without_work_for_a_day_stop_the_weights(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    close(scorer_of(world, history))
    set_before(history)
    world.now = MEASURED.at + FRESH_STATE_S - 1.5 * WINDOW_S
    run(scorer_of(world, history), world, False, False, False, False)
    assert world.set
    assert max(at for at, _ in world.set) < MEASURED.at + FRESH_STATE_S


def test_who_is_caught_loses_its_weight_at_once_and_not_at_the_windows_end(
    world: World, history: History
) -> None:
    world.add("a", "b", "c")
    history.add_slot([replace(MEASURED, hotkey=name) for name in "abc"])
    close(scorer_of(world, history))
    set_before(history)
    world.now = BEGIN + WINDOW_S

    def catch(window: int) -> None:
        world.banned_ones = {"b": "proof"}

    world.on_round = catch
    run(scorer_of(world, history), world, False)
    within = [weights for at, weights in world.set if at < BEGIN + 2 * WINDOW_S]
    assert within[0] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert within[-1] == pytest.approx({"a": 1 / 2, "c": 1 / 2})


def test_if_all_are_caught_the_setter_is_told_of_nobody(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    close(scorer_of(world, history))
    set_before(history)
    world.banned_ones = {"a": "proof"}
    run(scorer_of(world, history), world, False)
    assert world.set
    assert all(weights == {} for _, weights in world.set)


@pytest.mark.parametrize("error", [ChainUnavailable("no answer"), RuntimeError("a bug")])
def test_a_failure_to_set_is_tried_again_and_disturbs_no_window(
    world: World, history: History, error: Exception
) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    close(scorer_of(world, history))
    set_before(history)
    world.now = BEGIN + WINDOW_S
    world.set_error = error
    run(scorer_of(world, history), world, False)
    assert len(world.set) >= 4
    last = history.last_window()
    assert last is not None
    assert last[0] == WINDOW + 1
