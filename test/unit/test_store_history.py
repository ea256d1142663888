"""The validator's history: what was written is read back by hotkey, and old rows grow coarse."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from mapreduce.errors import LocalError
from mapreduce.store import retention
from mapreduce.store.database import Database
from mapreduce.store.history import (
    Day,
    History,
    Known,
    Leader,
    Measurement,
    Outcome,
    Score,
    Seen,
    Weights,
)
from mapreduce.store.ledger import Ledger
from mapreduce.store.retention import KEEP_RAW_S, KEEP_STANDING_S, KEEP_WEIGHTS_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mapreduce.store.records import Result

DAY_S = 86400.0
MEASURED = Measurement(
    at=10.0,
    window=3,
    job="j",
    hotkey="m0",
    outcome="measured",
    goodput_bytes_per_s=5e6,
    latency_s=0.25,
    seconds=10.0,
    bytes=50_000_000,
    reason="",
)
FAILED = dataclasses.replace(
    MEASURED, outcome="failed", goodput_bytes_per_s=0.0, latency_s=None, reason="stalled"
)
VOID = dataclasses.replace(FAILED, outcome="void", reason="a bot stopped")
SCORE = Score(rank=1, score=2.5, weight=0.75, components_json='{"gate": 1.0}')
OUTCOME = Outcome(job="j", owner="c0", hotkey="m0", completed=3, failed=1, ratio=0.5, at=10.0)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(tmp_path / "validator.sqlite") as opened:
        yield opened


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


def seen(uid: int, hotkey: str, ip: str | None = "192.0.2.1") -> Seen:
    return Seen(uid=uid, hotkey=hotkey, coldkey=f"cold {hotkey}", ip=ip)


def known(hotkey: str, uid: int | None, last_seen: float, ip: str | None = "192.0.2.1") -> Known:
    return Known(hotkey=hotkey, uid=uid, coldkey=f"cold {hotkey}", ip=ip, last_seen=last_seen)


def at(moment: float, row: Measurement = MEASURED, hotkey: str = "m0") -> Measurement:
    return dataclasses.replace(row, at=moment, hotkey=hotkey)


def close(history: History, window: int, moment: float, *hotkeys: str) -> None:
    history.close_window(
        window,
        moment,
        dict.fromkeys(hotkeys, f"standing {window}"),
        {
            hotkey: dataclasses.replace(SCORE, rank=rank, score=float(window))
            for rank, hotkey in enumerate(hotkeys, 1)
        },
    )


def add_weights(history: History, moment: float, result: Result) -> None:
    history.add_weights(at=moment, block=7, vector_json="{}", result=result, reason="why")


# Neurons -----------------------------------------------------------------------------------------


def test_a_neuron_is_known_as_it_was_last_seen(history: History) -> None:
    history.see([seen(0, "a"), seen(1, "b", None)], 1.0)
    history.see([seen(0, "a", "192.0.2.9"), seen(1, "b", None)], 2.0)
    assert history.known() == {"a": known("a", 0, 2.0, "192.0.2.9"), "b": known("b", 1, 2.0, None)}


def test_who_lost_its_uid_is_known_without_one(history: History) -> None:
    history.see([seen(0, "a"), seen(1, "b")], 1.0)
    history.see([seen(0, "new"), seen(1, "b")], 2.0)
    assert history.known() == {
        "a": known("a", None, 1.0),
        "b": known("b", 1, 2.0),
        "new": known("new", 0, 2.0),
    }


def test_two_hotkeys_may_change_places(history: History) -> None:
    history.see([seen(0, "a"), seen(1, "b")], 1.0)
    history.see([seen(0, "b"), seen(1, "a")], 2.0)
    assert {hotkey: row.uid for hotkey, row in history.known().items()} == {"a": 1, "b": 0}


def test_the_ip_of_one_that_stopped_serving_is_kept(history: History) -> None:
    history.see([seen(0, "a")], 1.0)
    history.see([seen(0, "a", None)], 2.0)
    assert history.known() == {"a": known("a", 0, 2.0)}


def test_a_hotkey_that_moved_keeps_its_history_and_a_new_one_starts_with_none(
    history: History,
) -> None:
    history.see([seen(0, "a")], 1.0)
    history.add_slot([at(1.0, hotkey="a")])
    close(history, 1, 2.0, "a")
    history.see([seen(0, "new"), seen(1, "a")], 3.0)
    assert history.standings() == {"a": "standing 1"}
    assert history.history_of("a", 0.0).measurements == (at(1.0, hotkey="a"),)
    assert history.history_of("new", 0.0).measurements == ()


def test_a_hotkey_that_was_never_seen_registered_is_not_known(history: History) -> None:
    history.add_slot([MEASURED])
    assert history.known() == {}


# Measurements ------------------------------------------------------------------------------------


def test_measurements_are_read_by_time_and_hotkey(history: History) -> None:
    rows = [at(2.0, hotkey="m1"), at(1.0), at(3.0, FAILED), at(3.0, VOID)]
    history.add_slot(rows)
    assert history.measurements(0.0) == [rows[1], rows[0], rows[2], rows[3]]
    assert history.measurements(2.0, 3.0) == [rows[0]]
    assert history.measurements(2.0, hotkey="m0") == rows[2:]
    assert history.measurements(0.0, 3.0, "m0") == [rows[1]]
    assert history.measurements(0.0, hotkey="other") == []


def test_a_slot_is_kept_entirely_or_not_at_all(history: History) -> None:
    broken = dataclasses.replace(at(2.0), outcome="lost")
    with pytest.raises(LocalError, match="CHECK"):
        history.add_slot([at(1.0), broken])
    with pytest.raises(LocalError, match="NOT NULL"):  # SQLite has no NaN
        history.add_slot([at(1.0), dataclasses.replace(MEASURED, goodput_bytes_per_s=float("nan"))])
    assert history.measurements(0.0) == []


def test_traffic_counts_all_that_was_moved_whatever_it_showed(history: History) -> None:
    assert history.traffic_since(0.0) == 0
    history.add_slot([at(1.0), at(2.0, FAILED), at(3.0, VOID)])
    assert history.traffic_since(0.0) == 150_000_000
    assert history.traffic_since(2.0) == 100_000_000
    assert history.traffic_since(4.0) == 0


# Real jobs ---------------------------------------------------------------------------------------


def test_the_latest_outcome_of_a_job_and_a_miner_counts(history: History) -> None:
    later = dataclasses.replace(OUTCOME, completed=9, ratio=None, at=12.0)
    others = [
        dataclasses.replace(OUTCOME, hotkey="m1"),
        dataclasses.replace(OUTCOME, job="k", at=11.0),
    ]
    history.add_outcomes([OUTCOME, *others])
    history.add_outcomes([later])
    assert history.outcomes(0.0) == [*others, later]
    assert history.outcomes(11.5) == [later]
    assert history.outcomes(13.0) == []


# Windows -----------------------------------------------------------------------------------------


def test_a_window_is_closed_with_its_standings_and_scores(history: History) -> None:
    assert history.last_window() is None
    assert history.scores() == {}
    close(history, 5, 100.0, "a", "b")
    close(history, 6, 200.0, "b")
    assert history.last_window() == (6, 200.0)
    assert history.scores() == {"b": dataclasses.replace(SCORE, score=6.0)}
    assert list(history.scores(5)) == ["a", "b"]
    assert history.scores(7) == {}
    assert history.standings() == {"a": "standing 5", "b": "standing 6"}


def test_the_newest_window_is_the_one_that_was_closed_last(history: History) -> None:
    close(history, 900, 100.0, "a")
    close(history, 30, 200.0, "a")  # windows have become longer, so their numbers smaller
    assert history.last_window() == (30, 200.0)
    assert history.scores()["a"].score == 30.0


def test_a_window_that_is_closed_again_is_replaced(history: History) -> None:
    close(history, 5, 100.0, "a", "b")
    close(history, 5, 101.0, "b")
    assert history.last_window() == (5, 101.0)
    assert list(history.scores()) == ["b"]


def test_a_window_is_closed_entirely_or_not_at_all(history: History) -> None:
    close(history, 5, 100.0, "a")
    broken = {"a": SCORE, "b": dataclasses.replace(SCORE, weight=float("nan"))}
    with pytest.raises(LocalError, match="NOT NULL"):
        history.close_window(6, 200.0, {"a": "standing 6"}, broken)
    assert history.last_window() == (5, 100.0)
    assert history.standings() == {"a": "standing 5"}


def test_a_full_disk_leaves_the_window_before(database: Database, history: History) -> None:
    close(history, 5, 100.0, "a")
    ((pages,),) = database.execute("PRAGMA page_count")
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LocalError, match="full"):
        history.close_window(6, 200.0, {"a": "standing 6" * 10_000}, {"a": SCORE})
    assert history.last_window() == (5, 100.0)
    assert history.standings() == {"a": "standing 5"}
    database.execute("PRAGMA max_page_count = 1000000")
    close(history, 6, 200.0, "a")
    assert history.last_window() == (6, 200.0)


# Weights -----------------------------------------------------------------------------------------


def test_the_last_weights_are_told_apart_by_how_it_ended(history: History) -> None:
    assert history.last_weights() is None
    for moment, result in ((1.0, "set"), (2.0, "set"), (3.0, "refused"), (4.0, "dry run")):
        add_weights(history, moment, result)  # type: ignore[arg-type]
    assert history.last_weights() == Weights(
        at=2.0, block=7, vector_json="{}", result="set", reason="why"
    )
    newest = [history.last_weights(result) for result in ("refused", "dry run")]  # type: ignore[arg-type]
    assert [row.at for row in newest if row] == [3.0, 4.0]
    assert history.last_weights("unreachable") is None
    with pytest.raises(LocalError, match="CHECK"):
        add_weights(history, 5.0, "lost")  # type: ignore[arg-type]


# For people --------------------------------------------------------------------------------------


def test_the_leaderboard_joins_what_belongs_to_a_score(
    database: Database, history: History
) -> None:
    assert history.leaderboard() == []
    history.see([seen(4, "a"), seen(2, "b", None)], 1.0)
    history.add_slot([at(1.0, hotkey="a"), at(2.0, FAILED, "a"), at(3.0, VOID, "a")])
    history.add_slot([at(1.0, hotkey="b"), at(2.0, VOID, "c")])
    for number, (culprit, role) in enumerate(
        [("a", "miner"), ("a", "miner"), ("b", "peer"), ("other", "miner")]
    ):
        Ledger(database).add_proof(
            f"id{number}",
            kind="F1",
            role=role,
            culprit=culprit,
            job="j",
            step=1,
            segment=0,
            data=b"evidence",
            now=float(number),
        )
    close(history, 5, 100.0, "c", "b", "a")
    close(history, 6, 200.0, "b", "a", "c")
    row = Leader(
        hotkey="b",
        uid=2,
        ip=None,
        rank=1,
        score=6.0,
        weight=0.75,
        components_json='{"gate": 1.0}',
        measured_at=1.0,
        goodput_bytes_per_s=5e6,
        strikes=(),
    )
    assert history.leaderboard() == [
        row,
        dataclasses.replace(
            row,
            hotkey="a",
            uid=4,
            ip="192.0.2.1",
            rank=2,
            measured_at=2.0,
            goodput_bytes_per_s=0.0,
            strikes=("id1", "id0"),
        ),
        dataclasses.replace(
            row, hotkey="c", uid=None, rank=3, measured_at=None, goodput_bytes_per_s=None
        ),
    ]


def test_the_history_of_one_hotkey_holds_nothing_of_others(history: History) -> None:
    for window, hotkeys in ((1, ("m0", "m1")), (2, ("m1",)), (3, ("m1", "m0"))):
        close(history, window, float(window), *hotkeys)
    history.add_slot([at(1.0), at(3.0), at(3.0, hotkey="m1")])
    history.add_outcomes([OUTCOME, dataclasses.replace(OUTCOME, hotkey="m1")])
    found = history.history_of("m0", 2.0)
    assert found.measurements == (at(3.0),)
    assert found.outcomes == (OUTCOME,)
    assert found.scores == ((3, 3.0, dataclasses.replace(SCORE, rank=2, score=3.0)),)
    assert found.days == ()
    assert [window for window, *_ in history.history_of("m0", 0.0).scores] == [1, 3]


# What grows old ----------------------------------------------------------------------------------


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
