"""A validator's state is as it was after a release that failed."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from mapreduce.errors import LocalError
from mapreduce.store.aside import let_go, put_back, set_aside


def make(path, version=2, rows=("a",)):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [(row,) for row in rows])
        connection.execute(f"PRAGMA user_version = {version}")


def rows(path):
    with closing(sqlite3.connect(path)) as connection:
        return [row for (row,) in connection.execute("SELECT x FROM t ORDER BY x")]


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "validator.sqlite"
    make(path)
    return path


def test_a_converted_state_goes_back(state):
    set_aside(state)
    make(state, version=3, rows=("b",))
    assert put_back(state)
    assert rows(state) == ["a"]
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_what_was_written_under_the_same_schema_stays(state):
    set_aside(state)
    make(state, rows=("b",))
    assert not put_back(state)
    assert rows(state) == ["a", "b"]
    assert not put_back(state)  # there is no copy any more


def test_a_destroyed_state_goes_back(state):
    set_aside(state)
    state.write_bytes(b"not a database at all" * 100)
    assert put_back(state)
    assert rows(state) == ["a"]


def test_what_a_killed_process_left_in_the_log_is_copied_too(state, tmp_path):
    held = sqlite3.connect(state)  # keeps SQLite from folding the log into the file
    held.execute("SELECT * FROM t").fetchall()
    make(state, rows=("b",))
    set_aside(state)
    held.close()
    make(state, version=9, rows=("c",))
    put_back(state)
    assert rows(state) == ["a", "b"]


def test_the_copy_is_for_this_user_alone_and_goes(state):
    set_aside(state)
    (copy,) = state.parent.glob("*-aside")
    assert copy.stat().st_mode & 0o777 == 0o600
    let_go(state)
    let_go(state)
    assert not copy.exists()


def test_a_copy_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(LocalError, match="missing"):
        set_aside(tmp_path / "missing" / "validator.sqlite")
    with pytest.raises(LocalError, match="none"):
        set_aside(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
