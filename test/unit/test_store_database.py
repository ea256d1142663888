"""The validator's file: who may open it, how an older one is converted, what a failure leaves."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mapreduce.errors import LocalError
from mapreduce.store import database as database_module
from mapreduce.store.database import Database
from mapreduce.store.history import History
from mapreduce.store.ledger import Ledger
from mapreduce.store.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from pathlib import Path

# As the release that knew version 1 wrote it; not the text in `schema`, which must go on making it.
VERSION_1 = """
CREATE TABLE proofs (id TEXT PRIMARY KEY NOT NULL, kind TEXT NOT NULL,
 role TEXT NOT NULL CHECK (role IN ('peer', 'miner')), culprit TEXT NOT NULL,
 job TEXT NOT NULL, step INTEGER NOT NULL, segment INTEGER NOT NULL, at REAL NOT NULL,
 data BLOB NOT NULL);
CREATE INDEX proofs_at ON proofs (at);
CREATE TABLE entries (at REAL NOT NULL,
 ledger TEXT NOT NULL CHECK (ledger IN ('unavailable', 'unattributed')),
 peer TEXT, miner TEXT, job TEXT NOT NULL, step INTEGER NOT NULL, segment INTEGER NOT NULL,
 what TEXT NOT NULL,
 CHECK ((peer IS NULL) + (miner IS NULL) = (ledger = 'unavailable')));
CREATE INDEX entries_at ON entries (ledger, at);
CREATE UNIQUE INDEX disputes ON entries (peer, miner, job, step, segment)
 WHERE ledger = 'unattributed';
CREATE TABLE jobs (job TEXT PRIMARY KEY NOT NULL, at REAL NOT NULL, data TEXT NOT NULL);
INSERT INTO proofs VALUES ('a', 'F1', 'miner', 'm0', 'j', 7, 3, 10.5, x'0102');
INSERT INTO entries VALUES (2.0, 'unavailable', 'p0', NULL, 'j', 1, 2, 'no opening');
INSERT INTO entries VALUES (3.0, 'unattributed', 'p0', 'm0', 'j', 1, 2, 'rejected root');
INSERT INTO jobs VALUES ('j', 4.0, '{"job": "j"}');
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "validator.sqlite"


def write_version_1(path: Path) -> None:
    path.parent.mkdir()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.executescript(VERSION_1)
    raw.execute(f"PRAGMA application_id = {0x4D524C31}")
    raw.execute("PRAGMA user_version = 1")
    raw.commit()
    raw.close()


def tables_of(path: Path) -> list[tuple[str, str]]:
    raw = sqlite3.connect(path)
    rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
    tables = [(name, " ".join(sql.split())) for name, sql in rows]
    raw.close()
    return tables


def test_the_files_are_for_the_user_alone(path: Path) -> None:
    mask = os.umask(0)
    try:
        with Database.open(path):
            files = sorted(path.parent.iterdir())
            names = [file.name.removeprefix(path.name) for file in files]
            assert names == ["", "-lock", "-shm", "-wal"]
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(mask)


def test_a_file_of_version_1_opens_and_keeps_everything(path: Path, tmp_path: Path) -> None:
    write_version_1(path)
    with Database.open(path) as database:
        ledger = Ledger(database)
        assert [(entry.id, entry.culprit, entry.at) for entry in ledger.proofs()] == [
            ("a", "m0", 10.5)
        ]
        assert ledger.proof("a") == b"\x01\x02"
        assert [entry.hotkey for entry in ledger.unavailable(job="j")] == ["p0"]
        assert [(entry.peer, entry.miner) for entry in ledger.disputes()] == [("p0", "m0")]
        assert ledger.job("j") == '{"job": "j"}'
        assert History(database).known() == {}
        assert database.execute("PRAGMA user_version") == [(SCHEMA_VERSION,)]
    Database.open(tmp_path / "new").close()
    assert tables_of(path) == tables_of(tmp_path / "new")


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_1(path)
    before = tables_of(path)
    migrations = (*database_module.MIGRATIONS[:1], ("CREATE TABLE new (x)", "no statement"))
    with monkeypatch.context() as patch:
        patch.setattr(database_module, "MIGRATIONS", migrations)
        with pytest.raises(LocalError, match=f"{path}.*syntax"):
            Database.open(path)
    assert tables_of(path) == before
    with Database.open(path) as database:
        assert Ledger(database).proof("a") == b"\x01\x02"


def test_a_newer_schema_is_refused(path: Path) -> None:
    Database.open(path).close()
    newer = SCHEMA_VERSION + 1
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    raw.execute(f"PRAGMA user_version = {newer}")
    raw.close()
    with pytest.raises(LocalError, match=rf"{path}.* {newer}, .* {SCHEMA_VERSION};"):
        Database.open(path)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no database at all" * 100)
    foreign = tmp_path / "foreign"
    raw = sqlite3.connect(foreign)
    raw.execute("CREATE TABLE t (x)")
    raw.close()
    for file in (garbage, foreign):
        before = file.read_bytes()
        for opened in (Database.open, Database.open_read_only):
            with pytest.raises(LocalError, match=str(file)):
                opened(file)
        assert file.read_bytes() == before
    for impossible in (tmp_path, garbage / "validator.sqlite"):
        with pytest.raises(LocalError, match=str(impossible)):
            Database.open(impossible)


def test_a_damaged_file_is_named(path: Path) -> None:
    with Database.open(path) as database:
        for number in range(50):
            database.execute("INSERT INTO jobs VALUES (?, 0, ?)", (str(number), "x" * 1000))
    pages = bytearray(path.read_bytes())
    pages[8192:] = b"\xff" * (len(pages) - 8192)
    path.write_bytes(pages)
    with pytest.raises(LocalError, match=rf"{path}.*malformed"), Database.open(path) as database:
        database.execute("SELECT * FROM jobs")


def test_a_second_validator_is_refused_and_told_which_process_has_the_file(path: Path) -> None:
    with (
        Database.open(path),
        pytest.raises(LocalError, match=rf"{path} is in use by another process, {os.getpid()};"),
    ):
        Database.open(path)
    Database.open(path).close()  # neither the refusal nor the end left a lock


def test_a_file_is_free_again_when_its_process_was_killed(path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mapreduce.store.database import Database;"
        "database = Database.open(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    with holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(LocalError, match=f"process, {holder.pid};"):
                Database.open(path)
        finally:
            holder.kill()
    Database.open(path).close()


def test_a_reader_sees_what_the_validator_writes_and_writes_nothing(path: Path) -> None:
    with Database.open(path) as database, Database.open_read_only(path) as reader:
        Ledger(database).add_job("j", "data", 1.0)
        assert Ledger(reader).job("j") == "data"
        with reader.transaction():
            assert Ledger(reader).job("j") == "data"
            Ledger(database).add_job("k", "data", 2.0)
            assert Ledger(reader).job("k") is None  # one moment
        assert Ledger(reader).job("k") == "data"
        with pytest.raises(LocalError, match=f"{path}.*readonly"):
            Ledger(reader).add_job("l", "data", 3.0)
    with Database.open_read_only(path) as reader:  # and when no validator runs
        assert Ledger(reader).job("k") == "data"


def test_a_reader_makes_and_converts_no_file(path: Path) -> None:
    with pytest.raises(LocalError, match=str(path)):
        Database.open_read_only(path)
    assert not path.exists()
    write_version_1(path)
    with pytest.raises(LocalError, match=f"{path} has schema version 1"):
        Database.open_read_only(path)
    path.write_bytes(b"")
    with pytest.raises(LocalError, match=f"{path} has schema version 0"):
        Database.open_read_only(path)


def test_a_transaction_happens_entirely_or_not_at_all(path: Path) -> None:
    insert = "INSERT INTO jobs VALUES (?, 0, '')"

    def jobs(database: Database) -> list[str]:
        return [job for (job,) in database.execute("SELECT job FROM jobs ORDER BY job")]

    with Database.open(path) as database:
        with database.transaction():
            database.execute(insert, ("a",))
            database.execute_many(insert, [("b",), ("c",)])
        with pytest.raises(LocalError, match="UNIQUE"), database.transaction():
            database.execute_many(insert, [("d",), ("a",)])
        with contextlib.suppress(KeyboardInterrupt), database.transaction():
            database.execute(insert, ("e",))
            raise KeyboardInterrupt
        assert jobs(database) == ["a", "b", "c"]


def test_a_locked_file_and_a_full_disk_are_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_S", 0.0)
    with Database.open(path) as database:
        ledger = Ledger(database)
        ledger.add_job("a", "data", 1.0)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LocalError, match=rf"{path}.*locked"):
            ledger.add_job("b", "data", 2.0)
        other.close()
        ((pages,),) = database.execute("PRAGMA page_count")
        database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LocalError, match=rf"{path}.*full"):
            ledger.add_job("b", "x" * 100_000, 2.0)
        assert (ledger.job("a"), ledger.job("b")) == ("data", None)  # nothing by halves
        database.execute("PRAGMA max_page_count = 1000000")
        ledger.add_job("b", "data", 3.0)
        assert ledger.job("b") == "data"
