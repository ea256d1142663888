"""One SQLite file as a transactional key-value store. Knows files, locks, JSON and errors of the
disk; knows nothing of blocks, accounts or subnets.

A value is addressed as on a real chain: (pallet, item, keys). Beside the `kv` table there is
`included`, the log of the extrinsics of recent blocks. Many processes may open the same file; one
of them writes at a time.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final

from mapreduce.errors import ChainUnavailable, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

Key = str | int

APPLICATION_ID: Final = 0x4D524331  # "MRC1" in the file's header: tells our files from foreign ones
SCHEMA_VERSION: Final = 1

_BUSY_S: Final = 5.0  # the longest a read waits for another process's recovery or checkpoint
_SCHEMA: Final = (
    "CREATE TABLE kv (pallet TEXT NOT NULL, item TEXT NOT NULL, keys TEXT NOT NULL,"
    " value TEXT NOT NULL, PRIMARY KEY (pallet, item, keys)) WITHOUT ROWID",
    "CREATE TABLE included (block INTEGER NOT NULL, position INTEGER NOT NULL, hash TEXT NOT NULL,"
    " record TEXT NOT NULL, PRIMARY KEY (block, position)) WITHOUT ROWID",
)


class Ledger:
    """An open file. Use it from the thread that opened it.

    Every method raises `ChainUnavailable`, naming the file, when the disk or the file fails it.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def close(self) -> None:
        """Close the file; a transaction still open is undone."""
        self._connection.close()

    # Reading -------------------------------------------------------------------------------------

    def get(self, pallet: str, item: str, keys: Sequence[Key] = ()) -> Any:  # Any: decoded JSON
        """The value stored there, or None."""
        rows = self._execute(
            "SELECT value FROM kv WHERE pallet = ? AND item = ? AND keys = ?",
            (pallet, item, _encode(list(keys))),
        )
        return json.loads(rows[0][0]) if rows else None

    def scan(
        self, pallet: str, item: str, prefix: Sequence[Key] = ()
    ) -> list[tuple[tuple[Key, ...], Any]]:
        """Every entry whose keys begin with `prefix`: (the remaining keys, value), in key order."""
        where, arguments = "pallet = ? AND item = ?", [pallet, item]
        if prefix:
            # Keys are compact JSON arrays, so "[10," starts exactly those with first key 10; "-" is
            # the character after ",".
            start = _encode(list(prefix))[:-1]
            where += " AND keys >= ? AND keys < ?"
            arguments += [start + ",", start + "-"]
        rows = self._execute(f"SELECT keys, value FROM kv WHERE {where}", arguments)
        found = [
            (tuple(json.loads(keys)[len(prefix) :]), json.loads(value)) for keys, value in rows
        ]
        # The column sorts as text, which would put 10 before 2.
        return sorted(found, key=lambda entry: [(isinstance(k, str), k) for k in entry[0]])

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Reads inside see one state, whatever other processes write meanwhile."""
        if self._connection.in_transaction:
            yield
            return
        self._execute("BEGIN")
        try:
            yield
        finally:
            self._execute("COMMIT")

    # Writing -------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Start a write transaction; False when another process holds one (ask again later).

        It does not wait, because its caller runs on an event loop that has streams to serve.
        """
        self._execute("PRAGMA busy_timeout = 0")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                return False
            raise self._failure(error) from error
        finally:
            self._execute(f"PRAGMA busy_timeout = {_BUSY_S * 1000:.0f}")
        return True

    def commit(self) -> None:
        """Make the transaction visible to all. A failure leaves it open: `rollback` follows."""
        self._execute("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, if there still is one (SQLite itself ends some on a full disk)."""
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what was written inside if the block raises; the transaction around it goes on."""
        self._execute("SAVEPOINT dispatch")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:
                self._execute("ROLLBACK TO dispatch")
                self._execute("RELEASE dispatch")
            raise
        self._execute("RELEASE dispatch")

    def put(self, pallet: str, item: str, keys: Sequence[Key], value: Any) -> None:
        """Store a JSON value."""
        self._execute(
            "INSERT INTO kv VALUES (?, ?, ?, ?)"
            " ON CONFLICT (pallet, item, keys) DO UPDATE SET value = excluded.value",
            (pallet, item, _encode(list(keys)), _encode(value)),
        )

    def delete(self, pallet: str, item: str, keys: Sequence[Key]) -> None:
        """Forget one entry; nothing happens when there is none."""
        self._execute(
            "DELETE FROM kv WHERE pallet = ? AND item = ? AND keys = ?",
            (pallet, item, _encode(list(keys))),
        )

    # The log of recent blocks --------------------------------------------------------------------

    def append(self, block: int, first_position: int, extrinsic_hash: str, record: Any) -> int:
        """Log a record as the next of its block; returns its position."""
        rows = self._execute("SELECT MAX(position) FROM included WHERE block = ?", (block,))
        last: int | None = rows[0][0]
        position = first_position if last is None else last + 1
        self._execute(
            "INSERT INTO included VALUES (?, ?, ?, ?)",
            (block, position, extrinsic_hash, _encode(record)),
        )
        return position

    def included(self, block: int) -> list[tuple[int, str, Any]]:
        """What a block holds, in order: (position, extrinsic hash, record)."""
        rows = self._execute(
            "SELECT position, hash, record FROM included WHERE block = ? ORDER BY position",
            (block,),
        )
        return [(position, digest, json.loads(record)) for position, digest, record in rows]

    def forget_before(self, block: int) -> None:
        """Drop the log of the blocks before `block`, so that the file stops growing."""
        self._execute("DELETE FROM included WHERE block < ?", (block,))

    # ---------------------------------------------------------------------------------------------

    def _execute(self, statement: str, arguments: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, arguments).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> ChainUnavailable:
        return ChainUnavailable(f"the embedded chain {self.path} failed: {error}")


def open_ledger(
    path: Path, initialise: Callable[[Ledger], None], *, must_be_new: bool = False
) -> Ledger:
    """Open the file, creating it where there is none.

    `initialise` writes the first entries of a new file. Whoever of several processes comes first
    does so; the others find a complete file.

    Raises:
        ConfigError: the path cannot be written, holds something else, or was made by an
            incompatible version; with `must_be_new`, also when it already holds a chain.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open the embedded chain {path}: {error}") from error
    ledger = Ledger(path, connection)
    try:
        created = False
        if _is_empty(ledger, connection):
            _use_write_ahead_log(connection, path)
            created = _create(ledger, connection, initialise)
        if must_be_new and not created:
            raise ConfigError(f"{path} already holds an embedded chain; remove it to start anew")
        _use_write_ahead_log(connection, path)
        # NORMAL flushes at checkpoints only: a killed process loses nothing (the pages are with the
        # kernel), a power cut may take the last extrinsics but never corrupts the file. FULL would
        # cost a disk flush for each of them, for test money.
        connection.execute("PRAGMA synchronous = NORMAL")
        return ledger
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise ConfigError(f"cannot use {path} as an embedded chain: {error}") from error
        if isinstance(error, ChainUnavailable):
            raise ConfigError(str(error)) from error
        raise


def _is_empty(ledger: Ledger, connection: sqlite3.Connection) -> bool:
    """True for a file nobody has written yet; raises `ConfigError` for one that is not ours."""
    path = ledger.path
    with ledger.snapshot():  # another process may be creating it between one look and the next
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if application_id == 0 and version == 0 and tables == 0:
        return True
    if application_id != APPLICATION_ID:
        raise ConfigError(f"{path} is a database of another program, not an embedded chain")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"the embedded chain {path} has format {version}, this version reads {SCHEMA_VERSION}; "
            "remove the file to start a new chain, or use the version that made it"
        )
    return False


def _use_write_ahead_log(connection: sqlite3.Connection, path: Path) -> None:
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # SQLite does not apply its busy timeout to this switch, and a second process that opens
            # the new file at the same moment is an everyday case.
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
    if mode != "wal":
        raise ConfigError(
            f"the embedded chain {path} needs a local disk (SQLite offers mode {mode!r})"
        )


def _create(
    ledger: Ledger, connection: sqlite3.Connection, initialise: Callable[[Ledger], None]
) -> bool:
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have created it while this one waited for the lock.
        if not _is_empty(ledger, connection):
            return False
        for statement in _SCHEMA:
            connection.execute(statement)
        initialise(ledger)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        ledger.commit()
        return True
    finally:
        ledger.rollback()


def _encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
