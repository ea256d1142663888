"""A copy of a validator's state, kept while a newer release tries it.

A newer release may convert the file to a schema that the older one cannot read, so going back takes
the copy. Knows SQLite's versions and files; knows nothing of what the rows mean, nor of releases.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING

from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from pathlib import Path


def set_aside(path: Path) -> None:
    """Copy a state that no process has open. Raises LocalError if the disk is full, say."""
    copy, unfinished = _copy_of(path), path.with_name(f"{path.name}-aside.new")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        # Not a copy of the bytes: a killed process leaves part of them in a second file.
        existing = f"{path.absolute().as_uri()}?mode=rw"
        with (
            contextlib.closing(sqlite3.connect(existing, uri=True)) as source,
            contextlib.closing(sqlite3.connect(unfinished)) as target,
        ):
            source.backup(target)
        os.replace(unfinished, copy)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise LocalError(f"cannot copy the validator's state {path}: {error}") from None


def put_back(path: Path) -> bool:
    """Go back to the copy if the file has another schema by now, and remove the copy; returns
    whether it did. What was written since is lost only then. Raises LocalError."""
    copy = _copy_of(path)
    if not copy.exists():
        return False
    try:
        if _schema_version(path) == _schema_version(copy):
            copy.unlink()
            return False
        for suffix in ("-wal", "-shm"):  # they belong to the file that goes
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        os.replace(copy, path)
    except OSError as error:
        raise LocalError(f"cannot put {copy} back to {path}: {error.strerror}") from None
    return True


def let_go(path: Path) -> None:
    """Remove the copy, if there is one. Raises LocalError if it stays."""
    try:
        _copy_of(path).unlink(missing_ok=True)
    except OSError as error:
        raise LocalError(f"cannot remove {_copy_of(path)}: {error.strerror}") from None


def _copy_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-aside")


def _schema_version(path: Path) -> int | None:
    """None for a file that cannot be read any more."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        return None
