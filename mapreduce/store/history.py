"""The validator's history: neurons, measurements, real jobs, windows and the weights it set.

Knows the tables by hotkey. Knows nothing of clocks (the caller says what time it is), nor of what a
standing, a score or a component means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mapreduce.store.records import (
    Day,
    Known,
    Leader,
    Measurement,
    MinerHistory,
    Outcome,
    Score,
    Seen,
    Weights,
)
from mapreduce.store.retention import prune_history

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mapreduce.store.database import Database
    from mapreduce.store.records import Result

__all__ = [
    "Day",
    "History",
    "Known",
    "Leader",
    "Measurement",
    "MinerHistory",
    "Outcome",
    "Score",
    "Seen",
    "Weights",
]

_KNOW: Final = "INSERT INTO neurons (hotkey) VALUES (?) ON CONFLICT (hotkey) DO NOTHING"
_ID: Final = "(SELECT id FROM neurons WHERE hotkey = ?)"
_NEWEST: Final = "(SELECT window FROM windows ORDER BY at DESC, window DESC LIMIT 1)"


class History:
    """The history in an open file, which it shares with the ledger.

    Each method is one transaction: it has happened entirely when it returns, and not at all when it
    raises. All raise `LocalError`, naming the file and the reason, when the disk or the file fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # Neurons -------------------------------------------------------------------------------------

    def see(self, neurons: Iterable[Seen], now: float) -> None:
        """Note who holds which uid; all others hold none. A hotkey keeps its history as it moves.

        An ip is kept when a neuron stops serving: bans go by the last one.
        """
        rows = [(seen.hotkey, seen.uid, seen.coldkey, seen.ip, now) for seen in neurons]
        with self._database.transaction():
            # First, so that two that changed places do not meet at one uid.
            self._database.execute("UPDATE neurons SET uid = NULL WHERE uid IS NOT NULL")
            self._database.execute_many(
                "INSERT INTO neurons (hotkey, uid, coldkey, ip, last_seen) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (hotkey) DO UPDATE SET uid = excluded.uid,"
                " coldkey = excluded.coldkey, ip = COALESCE(excluded.ip, ip),"
                " last_seen = excluded.last_seen",
                rows,
            )

    def known(self) -> dict[str, Known]:
        """Every hotkey that was ever seen registered."""
        rows = self._database.execute(
            "SELECT hotkey, uid, coldkey, ip, last_seen FROM neurons WHERE last_seen IS NOT NULL"
        )
        return {
            hotkey: Known(hotkey=hotkey, uid=uid, coldkey=coldkey, ip=ip, last_seen=last_seen)
            for hotkey, uid, coldkey, ip, last_seen in rows
        }

    # Measurements --------------------------------------------------------------------------------

    def add_slot(self, rows: Sequence[Measurement]) -> None:
        """Keep what one benchmark job showed of each of its miners."""
        with self._database.transaction():
            self._database.execute_many(_KNOW, ((row.hotkey,) for row in rows))
            self._database.execute_many(
                f"INSERT INTO measurements VALUES (?, ?, ?, {_ID}, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        row.at,
                        row.window,
                        row.job,
                        row.hotkey,
                        row.outcome,
                        row.goodput_bytes_per_s,
                        row.latency_s,
                        row.seconds,
                        row.bytes,
                        row.reason,
                    )
                    for row in rows
                ),
            )

    def measurements(
        self, since: float, until: float | None = None, hotkey: str | None = None
    ) -> list[Measurement]:
        """Raw measurements from `since` on and before `until`, oldest first."""
        where, arguments = "m.at >= ?", [since]
        if until is not None:
            where, arguments = f"{where} AND m.at < ?", [*arguments, until]
        if hotkey is None:
            return self._measurements(where, tuple(arguments))
        return self._measurements(f"m.miner = {_ID} AND {where}", (hotkey, *arguments))

    def traffic_since(self, at: float) -> int:
        """Bytes that the bots have moved from `at` on, at most the last seven days."""
        ((nbytes,),) = self._database.execute(
            "SELECT COALESCE(SUM(bytes), 0) FROM measurements WHERE at >= ?", (at,)
        )
        return int(nbytes)

    # Real jobs -----------------------------------------------------------------------------------

    def add_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Keep what real jobs have shown of miners so far, in place of what they showed before."""
        with self._database.transaction():
            self._database.execute_many(_KNOW, ((seen.hotkey,) for seen in outcomes))
            self._database.execute_many(
                f"INSERT OR REPLACE INTO outcomes VALUES (?, {_ID}, ?, ?, ?, ?, ?)",
                (
                    (o.job, o.hotkey, o.owner, o.completed, o.failed, o.ratio, o.at)
                    for o in outcomes
                ),
            )

    def outcomes(self, since: float) -> list[Outcome]:
        """The outcomes noted from `since` on, oldest first."""
        return self._outcomes("o.at >= ?", (since,))

    # Windows -------------------------------------------------------------------------------------

    def close_window(
        self,
        window: int,
        at: float,
        standings: Mapping[str, str],
        scores: Mapping[str, Score],
    ) -> None:
        """Keep all that a window ends with. Whom `standings` does not name keeps the one it had."""
        with self._database.transaction():
            hotkeys = ((hotkey,) for hotkey in [*standings, *scores])
            self._database.execute_many(_KNOW, hotkeys)
            self._database.execute("INSERT OR REPLACE INTO windows VALUES (?, ?)", (window, at))
            self._database.execute("DELETE FROM scores WHERE window = ?", (window,))
            self._database.execute_many(
                f"INSERT OR REPLACE INTO standings VALUES ({_ID}, ?)", standings.items()
            )
            self._database.execute_many(
                f"INSERT INTO scores VALUES (?, {_ID}, ?, ?, ?, ?)",
                (
                    (window, hotkey, score.rank, score.score, score.weight, score.components_json)
                    for hotkey, score in scores.items()
                ),
            )

    def standings(self) -> dict[str, str]:
        """The last standing of each hotkey."""
        return dict(
            self._database.execute(
                "SELECT hotkey, standing FROM standings JOIN neurons ON id = miner"
            )
        )

    def last_window(self) -> tuple[int, float] | None:
        """The window that was closed last, and when."""
        rows = self._database.execute(f"SELECT window, at FROM windows WHERE window = {_NEWEST}")
        return rows[0] if rows else None

    def scores(self, window: int | None = None) -> dict[str, Score]:
        """The scores of a window, of the newest by default; empty if it is not kept any more."""
        which, arguments = (_NEWEST, ()) if window is None else ("?", (window,))
        rows = self._database.execute(
            "SELECT hotkey, rank, score, weight, components"
            f" FROM scores JOIN neurons ON id = miner WHERE window = {which} ORDER BY rank, hotkey",
            arguments,
        )
        return {hotkey: _score(columns) for hotkey, *columns in rows}

    # Weights -------------------------------------------------------------------------------------

    def add_weights(
        self, *, at: float, block: int, vector_json: str, result: Result, reason: str
    ) -> None:
        """Keep an attempt at setting weights, whichever way it ended."""
        self._database.execute(
            "INSERT INTO weights VALUES (?, ?, ?, ?, ?)", (at, block, vector_json, result, reason)
        )

    def last_weights(self, result: Result = "set") -> Weights | None:
        """The newest attempt that ended so."""
        rows = self._database.execute(
            "SELECT at, block, vector, result, reason FROM weights WHERE result = ?"
            " ORDER BY at DESC, rowid DESC LIMIT 1",
            (result,),
        )
        if not rows:
            return None
        at, block, vector, ended, reason = rows[0]
        return Weights(at=at, block=block, vector_json=vector, result=ended, reason=reason)

    # For people ----------------------------------------------------------------------------------

    def leaderboard(self) -> list[Leader]:
        """The scores of the newest window with what belongs to them, best first."""
        rows = self._database.execute(
            "SELECT n.hotkey, n.uid, n.ip, s.rank, s.score, s.weight, s.components, m.at,"
            " m.goodput, (SELECT group_concat(id) FROM (SELECT id FROM proofs"
            "  WHERE culprit = n.hotkey AND role = 'miner' ORDER BY at DESC))"
            " FROM scores s JOIN neurons n ON n.id = s.miner"
            " LEFT JOIN measurements m ON m.rowid = (SELECT rowid FROM measurements"
            "  WHERE miner = s.miner AND outcome <> 'void' ORDER BY at DESC LIMIT 1)"
            f" WHERE s.window = {_NEWEST} ORDER BY s.rank, n.hotkey"
        )
        return [
            Leader(
                hotkey=hotkey,
                uid=uid,
                ip=ip,
                rank=rank,
                score=score,
                weight=weight,
                components_json=components,
                measured_at=at,
                goodput_bytes_per_s=goodput,
                strikes=tuple(strikes.split(",")) if strikes else (),
            )
            for hotkey, uid, ip, rank, score, weight, components, at, goodput, strikes in rows
        ]

    def history_of(self, hotkey: str, since: float) -> MinerHistory:
        """What is known of one hotkey from `since` on."""
        with self._database.transaction():
            scores = self._database.execute(
                "SELECT s.window, w.at, rank, score, weight, components FROM scores s"
                f" JOIN windows w ON w.window = s.window WHERE miner = {_ID} AND w.at >= ?"
                " ORDER BY w.at, s.window",
                (hotkey, since),
            )
            return MinerHistory(
                measurements=tuple(self.measurements(since, hotkey=hotkey)),
                outcomes=tuple(self._outcomes(f"o.miner = {_ID} AND o.at >= ?", (hotkey, since))),
                scores=tuple((window, at, _score(columns)) for window, at, *columns in scores),
                days=tuple(self._days(hotkey, since)),
            )

    # ---------------------------------------------------------------------------------------------

    def prune(self, now: float) -> int:
        """Aggregate or drop a bounded number of rows that are too old; returns how many went.

        Call it after each window; while it returns more than 0, another call finds more to do.
        """
        return prune_history(self._database, now)

    # Any in what follows: the columns of a row, which the schema types.

    def _measurements(self, where: str, arguments: tuple[Any, ...]) -> list[Measurement]:
        rows = self._database.execute(
            "SELECT m.at, window, job, hotkey, outcome, goodput, latency, seconds, bytes, reason"
            f" FROM measurements m JOIN neurons ON id = miner WHERE {where} ORDER BY m.at, m.rowid",
            arguments,
        )
        return [
            Measurement(
                at=at,
                window=window,
                job=job,
                hotkey=hotkey,
                outcome=outcome,
                goodput_bytes_per_s=goodput,
                latency_s=latency,
                seconds=seconds,
                bytes=nbytes,
                reason=reason,
            )
            for at, window, job, hotkey, outcome, goodput, latency, seconds, nbytes, reason in rows
        ]

    def _outcomes(self, where: str, arguments: tuple[Any, ...]) -> list[Outcome]:
        names = Outcome.__slots__
        rows = self._database.execute(
            f"SELECT {', '.join(names)} FROM outcomes o JOIN neurons ON id = miner WHERE {where}"
            " ORDER BY at, job, hotkey",
            arguments,
        )
        return [Outcome(**dict(zip(names, row, strict=True))) for row in rows]

    def _days(self, hotkey: str, since: float) -> list[Day]:
        rows = self._database.execute(
            "SELECT day, hotkey, measured, failed, void, seconds, bytes, goodput_min,"
            " goodput_sum / measured, goodput_max, windows, score_sum / windows,"
            " weight_sum / windows FROM days JOIN neurons ON id = miner"
            f" WHERE miner = {_ID} AND day >= ? ORDER BY day",
            (hotkey, int(since // 86400)),
        )
        return [Day(**dict(zip(Day.__slots__, row, strict=True))) for row in rows]


def _score(columns: Sequence[Any]) -> Score:
    rank, score, weight, components = columns
    return Score(rank=rank, score=score, weight=weight, components_json=components)
