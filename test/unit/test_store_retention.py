"""The validator's history as it grows old: raw rows become one row per day, and work is bounded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from mapreduce.store import retention
from mapreduce.store.history import Day
from mapreduce.store.retention import KEEP_RAW_S, KEEP_STANDING_S, KEEP_WEIGHTS_S
from test.unit.test_store_history import (
    FAILED,
    MEASURED,
    OUTCOME,
    VOID,
    add_weights,
    at,
    close,
    database,
    history,
    seen,
)

if TYPE_CHECKING:
    from mapreduce.store.history import History

__all__ = ["database", "history"]  # fixtures

DAY_S = 86400.0


def prune(history: History, now: float) -> None:
    while history.prune(now):
        pass


def test_old_measurements_become_one_row_per_day(history: History) -> None:
    fast = dataclasses.replace(MEASURED, goodput_bytes_per_s=9e6)
    history.add_slot([at(1.0), at(2.0, fast), at(3.0, FAILED), at(4.0, VOID)])
    history.add_slot([at(DAY_S + 1.0, FAILED), at(2 * DAY_S)])
    history.add_slot([at(1.0, hotkey="m1")])
    prune(history, KEEP_RAW_S + 2 * DAY_S)
    assert history.measurements(0.0) == [at(2 * DAY_S)]  # not older than the limit
    first, second = history.history_of("m0", 0.0).days
    assert first == Day(
        day=0,
        hotkey="m0",
        measured=2,
        failed=1,
        void=1,
        seconds=40.0,
        bytes=200_000_000,
        goodput_min_bytes_per_s=5e6,
        goodput_mean_bytes_per_s=7e6,
        goodput_max_bytes_per_s=9e6,
        windows=0,
        score=None,
        weight=None,
    )
    assert (second.day, second.measured, second.failed) == (1, 0, 1)
    assert second.goodput_mean_bytes_per_s is None
    assert history.history_of("m0", DAY_S).days == (second,)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_a_day_adds_up_the_same_however_little_a_call_does(
    history: History, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(retention, "_ROWS", rows)
    goodputs = [5e6, 1e6, 9e6, 3e6]
    slots = [
        at(float(moment), dataclasses.replace(MEASURED, goodput_bytes_per_s=goodput))
        for moment, goodput in enumerate(goodputs, 1)
    ]
    history.add_slot([at(0.0, FAILED), *slots[:2], at(2.0, VOID), *slots[2:], at(9.0, FAILED)])
    calls = 0
    while history.prune(KEEP_RAW_S + 100.0):
        calls += 1
    # At least `rows` a call, and all that happened at one moment together.
    assert calls == {1: 6, 2: 4, 3: 2, 100: 1}[rows]
    (day,) = history.history_of("m0", 0.0).days
    assert (day.measured, day.failed, day.void) == (4, 2, 1)
    assert (day.goodput_min_bytes_per_s, day.goodput_max_bytes_per_s) == (1e6, 9e6)
    assert day.goodput_mean_bytes_per_s == sum(goodputs) / 4


def test_old_scores_become_one_row_per_day_but_the_newest_window_stays(history: History) -> None:
    history.add_slot([at(1.0, hotkey="a")])
    for window in (1, 2, 6):
        close(history, window, float(window), "a")
    close(history, 7, DAY_S, "a")
    prune(history, KEEP_RAW_S + 100 * DAY_S)
    assert history.last_window() == (7, DAY_S)
    assert history.scores()["a"].score == 7.0
    assert history.scores(6) == {}
    (day,) = history.history_of("a", 0.0).days
    assert (day.windows, day.score, day.weight, day.measured) == (3, 3.0, 0.75, 1)


def test_a_call_takes_a_bounded_number_of_windows(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_WINDOWS", 2)
    for window in range(6):
        close(history, window, float(window), "a")
    assert [history.prune(KEEP_RAW_S + 100.0) for _ in range(4)] == [2, 2, 1, 0]


def test_old_outcomes_and_weights_go(history: History) -> None:
    history.add_outcomes([OUTCOME, dataclasses.replace(OUTCOME, job="k", at=11.0)])
    for moment in (1.0, 2.0):
        add_weights(history, moment, "set")
    prune(history, KEEP_RAW_S + 11.0)
    assert [outcome.job for outcome in history.outcomes(0.0)] == ["k"]
    prune(history, KEEP_WEIGHTS_S + 2.0)
    assert history.last_weights() is not None
    prune(history, KEEP_WEIGHTS_S + 2.5)
    assert history.last_weights() is None


def test_a_standing_goes_when_its_hotkey_was_long_unregistered(history: History) -> None:
    history.see([seen(0, "gone"), seen(1, "stays")], 1.0)
    close(history, 1, 1.0, "gone", "stays")
    history.see([seen(1, "stays")], KEEP_STANDING_S + 1.0)
    prune(history, KEEP_STANDING_S + 1.0)
    assert set(history.standings()) == {"gone", "stays"}
    history.see([seen(1, "stays")], KEEP_STANDING_S + 2.0)
    prune(history, KEEP_STANDING_S + 2.0)
    assert history.standings() == {"stays": "standing 1"}
    assert set(history.known()) == {"gone", "stays"}  # bans go by its coldkey and ip


def test_a_validator_that_was_off_for_long_keeps_all_standings(history: History) -> None:
    history.see([seen(0, "a")], 1.0)
    close(history, 1, 1.0, "a")
    prune(history, 100 * KEEP_STANDING_S)
    assert history.standings() == {"a": "standing 1"}
