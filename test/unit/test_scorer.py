"""Windows: what was measured becomes standings and scores, once, and a restart loses none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.core.scoring import OwnerSeen, Seen, Standing, advance
from mapreduce.errors import ChainUnavailable, LocalError
from mapreduce.services.scorer import RETRY_S
from mapreduce.store.database import Database
from mapreduce.store.history import History, Outcome
from test.unit.test_scorer_support import (
    BEGIN,
    CONFIG,
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
    standing_of,
)

if TYPE_CHECKING:
    from pathlib import Path


# What a window brings -----------------------------------------------------------------------------


def test_the_rows_of_a_window_become_what_a_standing_is_made_of(
    world: World, history: History
) -> None:
    world.add("a", "b")
    history.add_slot(
        [
            MEASURED,
            replace(MEASURED, goodput_bytes_per_s=300e6, latency_s=None),
            FAILED,
            VOID,
            replace(FAILED, hotkey="b"),
            in_window(MEASURED, WINDOW - 1),
            replace(MEASURED, window=WINDOW + 1),
        ]
    )
    close(scorer_of(world, history))
    brought = Seen(
        goodputs_bytes_per_s=(100e6, 300e6, 0.0), completed=2, failed=1, latencies_s=(0.02,)
    )
    assert standing_of(history, "a") == advance(Standing(), brought, CONFIG)
    brought = Seen(goodputs_bytes_per_s=(0.0,), failed=1)
    assert standing_of(history, "b") == advance(Standing(), brought, CONFIG)


def test_a_row_that_was_written_after_its_window_ended_counts_in_its_window_alone(
    world: World, history: History
) -> None:
    world.add("a")
    history.add_slot([replace(MEASURED, at=BEGIN + WINDOW_S + 5)])
    scorer = scorer_of(world, history)
    close(scorer)
    after = standing_of(history, "a")
    assert after.completed == 1
    close(scorer, WINDOW + 1)
    assert standing_of(history, "a") == after


def test_void_shows_nothing_and_leaves_no_standing(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([VOID, VOID])
    close(scorer_of(world, history))
    assert history.standings() == {}
    assert history.scores() == {}


def test_a_window_is_closed_once_even_if_the_clock_is_set_back(
    world: World, history: History
) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    scorer = scorer_of(world, history)
    close(scorer)
    before = history.standings()
    close(scorer)
    close(scorer_of(world, history))  # another process
    assert history.standings() == before
    assert len(world.settled_with) == 1


def test_scores_have_ranks_weights_and_factors_and_the_recruiter_goes_by_them(
    world: World, history: History
) -> None:
    world.add("a", "b", "failing")
    history.add_slot(
        [
            MEASURED,
            replace(MEASURED, hotkey="b", goodput_bytes_per_s=300e6),
            replace(FAILED, hotkey="failing"),
        ]
    )
    close(scorer_of(world, history))
    scores = history.scores()
    assert [(h, s.rank) for h, s in scores.items()][:2] == [("b", 1), ("a", 2)]
    assert scores["b"].weight == pytest.approx(0.75)
    assert scores["a"].weight == pytest.approx(0.25)
    assert scores["failing"].weight == 0
    assert world.weights == pytest.approx({"b": 0.75, "a": 0.25})
    factors = json.loads(scores["b"].components_json)
    assert factors["goodput_bytes_per_s"] == 300e6
    assert not {"score", "weight"} & factors.keys()
    assert world.pruned == [world.now]


def test_real_jobs_are_added_up_by_owner_and_counted_once(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    first = Outcome(job="1", owner="o", hotkey="a", completed=1, failed=0, ratio=0.5, at=BEGIN + 1)
    world.outcomes = [
        first,
        replace(first, job="2", completed=0, failed=1, ratio=None),
        replace(first, job="3", ratio=0.25),
        replace(first, owner="p"),
        replace(first, hotkey="unmeasured"),
    ]
    scorer = scorer_of(world, history)
    close(scorer)
    owners = {
        "o": OwnerSeen(completed=2, failed=1, ratios=(0.5, 0.25)),
        "p": OwnerSeen(completed=1, ratios=(0.5,)),
    }
    brought = Seen(goodputs_bytes_per_s=(100e6,), completed=1, latencies_s=(0.02,), owners=owners)
    assert standing_of(history, "a") == advance(Standing(), brought, CONFIG)
    assert set(standing_of(history, "unmeasured").owners) == {"o"}
    after = history.standings()
    close(scorer, WINDOW + 1)
    close(scorer_of(world, history), WINDOW + 2)
    assert history.standings() == after
    # What the bots had measured before is what real jobs are held against.
    assert world.settled_with == [{}, {"a": 100e6}, {"a": 100e6}]


def test_whoever_is_banned_or_disputed_loses_its_weight_and_the_others_gain(
    world: World, history: History
) -> None:
    world.add("a", "b", "c")
    history.add_slot([replace(MEASURED, hotkey=name) for name in "abc"])
    world.banned_ones, world.disputed = {"a": "proof"}, {"b"}
    close(scorer_of(world, history))
    assert world.weights == pytest.approx({"b": 1 / 3, "c": 2 / 3})
    assert history.scores()["a"].weight == 0


def test_who_is_not_registered_has_no_score_and_goes_on_from_its_standing_when_it_is(
    world: World, history: History
) -> None:
    world.add("a", "b")
    history.add_slot([MEASURED, replace(MEASURED, hotkey="b")])
    scorer = scorer_of(world, history)
    close(scorer)
    before = history.standings()["a"]
    gone = world.neurons.pop("a")
    # Its uid goes to a newcomer, who inherits nothing.
    world.neurons["new"] = replace(gone, hotkey="new")
    close(scorer, WINDOW + 1)
    assert set(history.scores()) == {"b"}
    assert world.weights == {"b": 1.0}
    assert history.standings()["a"] == before
    del world.neurons["new"]
    world.neurons["a"] = replace(gone, uid=9)
    close(scorer, WINDOW + 2)
    assert set(history.scores()) == {"a", "b"}
    assert history.standings()["a"] == before


# One window after the other -----------------------------------------------------------------------


def test_a_window_is_a_round_then_its_end_then_its_scores(world: World, history: History) -> None:
    world.add("a")
    world.now = BEGIN + 30
    history.add_slot([MEASURED, replace(VOID, hotkey="b"), replace(FAILED, hotkey="c")])
    run(scorer_of(world, history), world, True, True)
    assert world.ran == [
        (WINDOW, BEGIN + WINDOW_S, {"a", "c"}),  # what an earlier process did is not done again
        (WINDOW + 1, BEGIN + 2 * WINDOW_S, set()),
    ]
    last = history.last_window()
    assert last is not None
    assert last[0] == WINDOW + 1
    assert last[1] >= BEGIN + 2 * WINDOW_S
    assert {h: n.uid for h, n in history.known().items()} == {"a": 0}
    assert world.coldkeys == {"a": "cold-a"}


def test_a_window_that_a_dead_process_left_is_scored_first(world: World, history: History) -> None:
    world.add("a")
    history.add_slot([in_window(MEASURED, WINDOW - 1)])
    run(scorer_of(world, history), world)
    last = history.last_window()
    assert last is not None
    assert last[0] == WINDOW - 1
    assert standing_of(history, "a").completed == 1
    before = history.standings()
    run(scorer_of(world, history), world)  # it dies again: nothing counts twice
    assert history.standings() == before


def test_of_what_was_left_only_the_window_just_before_is_scored(
    world: World, history: History
) -> None:
    world.add("a")
    history.add_slot([in_window(MEASURED, WINDOW - 2)])
    run(scorer_of(world, history), world)
    assert history.last_window() is None


def test_a_window_whose_scores_could_not_be_kept_is_scored_in_the_next(
    world: World, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    kept = history.close_window
    tried: list[int] = []

    def once_full(window: int, *rest: Any) -> None:
        tried.append(window)
        if len(tried) == 1:
            raise LocalError("the disk is full")
        kept(window, *rest)

    monkeypatch.setattr(history, "close_window", once_full)
    run(scorer_of(world, history), world, True, True)
    assert tried == [WINDOW, WINDOW, WINDOW + 1]
    assert RETRY_S in world.slept
    assert standing_of(history, "a").completed == 1


@pytest.mark.parametrize("error", [ChainUnavailable("no answer"), RuntimeError("a bug")])
def test_scoring_goes_on_after_any_failure(
    world: World, history: History, error: Exception
) -> None:
    world.add("a")

    def fail_once(window: int) -> None:
        world.on_round = lambda window: None
        raise error

    world.on_round = fail_once
    run(scorer_of(world, history), world, True, True)
    assert [window for window, _, _ in world.ran] == [WINDOW, WINDOW, WINDOW + 1]
    last = history.last_window()
    assert last is not None
    assert last[0] == WINDOW + 1


def test_a_chain_that_does_not_answer_at_first_costs_nothing_that_was_kept(
    world: World, history: History
) -> None:
    world.add("a")
    history.add_slot([MEASURED])
    set_before(history)
    close(scorer_of(world, history))
    world.unreachable = 2
    run(scorer_of(world, history), world, True)
    assert world.slept[:2] == [RETRY_S, RETRY_S]
    assert world.estimates == {"a": 100e6}


# Restarts -----------------------------------------------------------------------------------------


def test_a_restart_takes_up_standings_estimates_and_the_recruiters_weights(
    world: World, history: History
) -> None:
    world.add("a", "b", "never")
    rows = [MEASURED, replace(MEASURED, hotkey="b", goodput_bytes_per_s=300e6)]
    history.add_slot([*rows, replace(FAILED, hotkey="never")])
    close(scorer_of(world, history))
    world.weights, world.estimates = {}, {}
    run(scorer_of(world, history), world)
    assert world.weights["b"] == pytest.approx(0.75)
    assert world.weights["a"] == pytest.approx(0.25)
    assert world.estimates == {"a": 100e6, "b": 300e6}


def test_with_a_restart_in_each_window_the_standings_are_the_same_to_the_bit(
    world: World, history: History, tmp_path: Path
) -> None:
    world.add("a")
    shown = [100e6 / (n + 3) for n in range(8)]

    def standing(kept: History, restarts: bool) -> str:
        scorer = scorer_of(world, kept)
        for n, goodput in enumerate(shown):
            row = replace(MEASURED, goodput_bytes_per_s=goodput, latency_s=0.1 / (n + 7))
            kept.add_slot([in_window(row, WINDOW + n)])
            close(scorer_of(world, kept) if restarts else scorer, WINDOW + n)
        return kept.standings()["a"]

    with Database.open(tmp_path / "other.sqlite") as opened:
        assert standing(History(opened), restarts=True) == standing(history, restarts=False)
