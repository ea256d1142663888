"""The one SQLite file of a validator: opening, locking, migrating it, and running statements.

Knows files, transactions and schema versions. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING, Any, Final, Self

from mapreduce.errors import LocalError
from mapreduce.store.schema import APPLICATION_ID, MIGRATIONS, SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

# The validator is the only writer; longer means that something is wrong.
_BUSY_S: Final = 1.0


class Database:
    """An open file. Use it from the thread that opened it.

    One process at a time opens a file for writing and keeps it locked (through a second file beside
    it, whose name ends in `-lock`) until it closes it or dies; any number may read meanwhile.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock  # a file descriptor; None: read only

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file for writing, creating it (for this user alone) and its directories where
        need be. A file of an older version is brought up to this one, and keeps everything.

        Raises `LocalError` for a path that cannot be written, a file that holds something else,
        that a newer version made, or that another process has open.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise LocalError(f"cannot open the validator's state {path}: {error}") from error
        try:
            with contextlib.suppress(FileExistsError):
                path.touch(mode=0o600, exist_ok=False)  # SQLite's other files take over its mode
            connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
        except (OSError, sqlite3.Error) as error:
            os.close(lock)
            raise LocalError(f"cannot open the validator's state {path}: {error}") from error
        database = cls(path, connection, lock)
        try:
            database._prepare()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def open_read_only(cls, path: Path) -> Self:
        """Open an existing file to look at it, also while a validator writes it.

        Raises `LocalError` for a file that is missing or that this version cannot read.
        """
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_S)
        except sqlite3.Error as error:
            raise LocalError(f"cannot read the validator's state {path}: {error}") from error
        database = cls(path, connection, None)
        try:
            version = database._version()
            if version != SCHEMA_VERSION:
                raise LocalError(
                    f"the validator's state {path} has schema version {version}, this program "
                    f"reads {SCHEMA_VERSION}; a validator that opens it converts it"
                )
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file and give up its lock. A second time does nothing."""
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Any in what follows: the columns of a row, which the schema types.

    def execute(self, statement: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        """Run one statement and return its rows; outside `transaction` it is one of its own.

        Raises `LocalError`, naming the file and the reason, when the disk or the file fails.
        """
        try:
            return self._connection.execute(statement, arguments).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def execute_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each row of arguments, inside a `transaction`."""
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside happen together, or not at all when one raises.

        What they read belongs to one moment. Transactions do not nest.
        """
        self.execute("BEGIN" if self._lock is None else "BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite ends some of them itself: a full disk
                self._connection.rollback()
            raise

    # ---------------------------------------------------------------------------------------------

    def _failure(self, error: sqlite3.Error) -> LocalError:
        return LocalError(f"the validator's state {self.path} failed: {error}")

    def _prepare(self) -> None:
        version = self._version()
        if version == 0:
            self.execute("PRAGMA journal_mode = WAL")
        if version < SCHEMA_VERSION:
            with self.transaction():
                for statements in MIGRATIONS[version:]:
                    for statement in statements:
                        self.execute(statement)
                self.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        # A killed process loses nothing; a power cut may take the last rows, never the file.
        self.execute("PRAGMA synchronous = NORMAL")

    def _version(self) -> int:
        """0 for an empty file; raises `LocalError` for one that this version cannot use."""
        ((tables,),) = self.execute("SELECT COUNT(*) FROM sqlite_master")
        ((version,),) = self.execute("PRAGMA user_version")
        ((application_id,),) = self.execute("PRAGMA application_id")
        if application_id == 0 and version == 0 and tables == 0:
            return 0
        if application_id != APPLICATION_ID:
            raise LocalError(f"{self.path} is a database of another program, no validator's state")
        if version > SCHEMA_VERSION:
            raise LocalError(
                f"the validator's state {self.path} has schema version {version}, this program "
                f"knows {SCHEMA_VERSION}; use the version that made it, or another file"
            )
        return int(version)


def _lock(path: Path) -> int:
    # A file of its own: closing any descriptor of the database drops SQLite's own locks on it. It
    # is never removed, since two processes could then hold locks on two files of one name.
    lock = os.open(path.with_name(f"{path.name}-lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except BlockingIOError:
        holder = os.read(lock, 20).decode(errors="replace") or "unknown"
        os.close(lock)
        raise LocalError(
            f"the validator's state {path} is in use by another process, {holder}; "
            "a hotkey runs one validator at a time"
        ) from None
    except OSError:
        os.close(lock)
        raise
    return lock
