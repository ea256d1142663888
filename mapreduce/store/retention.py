"""How long a validator's history is kept, and how it grows old: raw rows become one row per day.

Knows the tables of the history. Every call does a bounded amount of work, so that a validator that
comes back after a month is not held up by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mapreduce.store.database import Database

_DAY_S: Final = 86400.0
KEEP_RAW_S: Final = 7 * _DAY_S  # as long as a ban
KEEP_STANDING_S: Final = 30 * _DAY_S  # after the hotkey was last seen registered
KEEP_WEIGHTS_S: Final = 30 * _DAY_S

# What one call takes at most; each is several times what one window brings.
_ROWS: Final = 10_000  # measurements, outcomes, attempts at weights
_WINDOWS: Final = 16


def prune_history(database: Database, now: float) -> int:
    """Aggregate or drop rows that are too old, a bounded number; returns how many went."""
    with database.transaction():
        return (
            _prune_measurements(database, now - KEEP_RAW_S)
            + _prune_windows(database, now - KEEP_RAW_S)
            + _prune_table(database, "outcomes", now - KEEP_RAW_S)
            + _prune_table(database, "weights", now - KEEP_WEIGHTS_S)
            + _prune_standings(database, now - KEEP_STANDING_S)
        )


def _oldest(database: Database, table: str, before: float) -> float | None:
    """The time up to which there are about `_ROWS` rows of those that are too old."""
    ((until,),) = database.execute(
        f"SELECT MAX(at) FROM (SELECT at FROM {table} WHERE at < ? ORDER BY at LIMIT ?)",
        (before, _ROWS),
    )
    return None if until is None else float(until)


def _prune_table(database: Database, table: str, before: float) -> int:
    until = _oldest(database, table, before)
    return len(database.execute(f"DELETE FROM {table} WHERE at <= ? RETURNING 1", (until,)))


def _prune_measurements(database: Database, before: float) -> int:
    until = _oldest(database, "measurements", before)
    database.execute(
        "INSERT INTO days (miner, day, measured, failed, void, seconds, bytes, goodput_sum,"
        " goodput_min, goodput_max)"
        " SELECT miner, CAST(at / ? AS INTEGER), SUM(outcome = 'measured'),"
        " SUM(outcome = 'failed'), SUM(outcome = 'void'), SUM(seconds), SUM(bytes),"
        " COALESCE(SUM(goodput) FILTER (WHERE outcome = 'measured'), 0),"
        " MIN(goodput) FILTER (WHERE outcome = 'measured'),"
        " MAX(goodput) FILTER (WHERE outcome = 'measured')"
        # Else SQLite takes the index that gives the groups in order, and reads all that is kept.
        " FROM measurements INDEXED BY measurements_at WHERE at <= ? GROUP BY 1, 2"
        " ON CONFLICT (miner, day) DO UPDATE SET measured = measured + excluded.measured,"
        " failed = failed + excluded.failed, void = void + excluded.void,"
        " seconds = seconds + excluded.seconds, bytes = bytes + excluded.bytes,"
        " goodput_sum = goodput_sum + excluded.goodput_sum,"
        # MIN and MAX of two are NULL when one is.
        " goodput_min = COALESCE(MIN(goodput_min, excluded.goodput_min), goodput_min,"
        "  excluded.goodput_min),"
        " goodput_max = COALESCE(MAX(goodput_max, excluded.goodput_max), goodput_max,"
        "  excluded.goodput_max)",
        (_DAY_S, until),
    )
    return len(database.execute("DELETE FROM measurements WHERE at <= ? RETURNING 1", (until,)))


def _prune_windows(database: Database, before: float) -> int:
    # Never the newest one: a validator that was off goes on from it, however old it is.
    rows = database.execute(
        "SELECT window, at FROM windows WHERE at < ?"
        " AND window <> (SELECT window FROM windows ORDER BY at DESC, window DESC LIMIT 1)"
        " ORDER BY at LIMIT ?",
        (before, _WINDOWS),
    )
    for window, at in rows:
        database.execute(
            "INSERT INTO days (miner, day, windows, score_sum, weight_sum)"
            " SELECT miner, ?, 1, score, weight FROM scores WHERE window = ?"
            " ON CONFLICT (miner, day) DO UPDATE SET windows = windows + 1,"
            " score_sum = score_sum + excluded.score_sum,"
            " weight_sum = weight_sum + excluded.weight_sum",
            (int(at // _DAY_S), window),
        )
        database.execute("DELETE FROM scores WHERE window = ?", (window,))
        database.execute("DELETE FROM windows WHERE window = ?", (window,))
    return len(rows)


def _prune_standings(database: Database, before: float) -> int:
    # By the last look at the chain, not by the clock alone: a validator that was off has seen
    # nobody for a while, and that says nothing about them.
    return len(
        database.execute(
            "DELETE FROM standings WHERE miner IN (SELECT id FROM neurons"
            " WHERE last_seen < MIN(?, (SELECT MAX(last_seen) FROM neurons) - ?)) RETURNING 1",
            (before, KEEP_STANDING_S),
        )
    )
