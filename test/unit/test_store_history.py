"""The validator's history: what was written is read back by hotkey."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import pytest

from mapreduce.errors import LocalError
from mapreduce.store.database import Database
from mapreduce.store.history import (
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

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mapreduce.store.records import Result

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


# At scale ----------------------------------------------------------------------------------------


def test_no_query_reads_a_large_table_whole(database: Database, history: History) -> None:
    statements: list[str] = []
    close(history, 1, 1.0, "m0")
    database._connection.set_trace_callback(statements.append)
    history.measurements(5.0)
    history.measurements(5.0, 6.0, "m0")
    history.traffic_since(5.0)
    history.outcomes(5.0)
    close(history, 2, 2.0, "m0")
    history.last_window()
    history.scores()
    history.scores(1)
    history.last_weights()
    history.leaderboard()
    history.history_of("m0", 5.0)
    history.prune(1e9)
    database._connection.set_trace_callback(None)
    plans = {
        statement: [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
        for statement in statements
        if not statement.startswith(("BEGIN", "COMMIT", "--"))
    }
    assert len(plans) > 20
    large = "measurements|m|outcomes|o|scores|s|proofs|weights|days|windows|w"
    # By `windows_at` is the newest one looked up: LIMIT 1.
    whole = re.compile(rf"SCAN ({large})\b(?! USING COVERING INDEX windows_at)")
    assert {text: plan for text, plan in plans.items() if any(map(whole.match, plan))} == {}
