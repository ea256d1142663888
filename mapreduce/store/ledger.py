"""The validator's record of who is to blame: proven, unavailable and unattributed, never mixed; and
of the jobs that it has granted.

Knows one SQLite file and its rows. Knows nothing of clocks (the caller says what time it is), of
what makes a proof valid, or of what an entry costs in score; bounds on strings are the caller's.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x4D524C31  # "MRL1" in the file's header: tells our files from foreign ones

KEEP_JOBS_S: Final = 7 * 86400.0  # far longer than a grant lives
_BUSY_S: Final = 1.0  # the validator is the only writer; longer means that something is wrong
_SCHEMA: Final = (
    "CREATE TABLE proofs (id TEXT PRIMARY KEY NOT NULL, kind TEXT NOT NULL,"
    " role TEXT NOT NULL CHECK (role IN ('peer', 'miner')), culprit TEXT NOT NULL,"
    " job TEXT NOT NULL, step INTEGER NOT NULL, segment INTEGER NOT NULL, at REAL NOT NULL,"
    " data BLOB NOT NULL)",
    "CREATE INDEX proofs_at ON proofs (at)",
    # Unavailable blames the one party that is named, unattributed names two and blames neither.
    "CREATE TABLE entries (at REAL NOT NULL,"
    " ledger TEXT NOT NULL CHECK (ledger IN ('unavailable', 'unattributed')),"
    " peer TEXT, miner TEXT, job TEXT NOT NULL, step INTEGER NOT NULL, segment INTEGER NOT NULL,"
    " what TEXT NOT NULL,"
    " CHECK ((peer IS NULL) + (miner IS NULL) = (ledger = 'unavailable')))",
    "CREATE INDEX entries_at ON entries (ledger, at)",
    "CREATE UNIQUE INDEX disputes ON entries (peer, miner, job, step, segment)"
    " WHERE ledger = 'unattributed'",
    "CREATE TABLE jobs (job TEXT PRIMARY KEY NOT NULL, at REAL NOT NULL, data TEXT NOT NULL)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofEntry:
    """A proof without its evidence: `culprit` is the hotkey that it convicts."""

    id: str
    kind: str
    role: str
    culprit: str
    job: str
    step: int
    segment: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnavailableEntry:
    """Something that `hotkey`, a peer or a miner as `role` says, should have given and did not."""

    role: str
    hotkey: str
    job: str
    step: int
    segment: int
    what: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DisputeEntry:
    """A contradiction between a peer and a miner; one of the two lies, nobody knows which."""

    peer: str
    miner: str
    job: str
    step: int
    segment: int
    what: str
    at: float


class Ledger:
    """An open file. Use it from the thread that opened it; two processes never write one.

    Each method is one transaction: it has happened entirely when it returns, and not at all when it
    raises. All raise `LocalError`, naming the file and the reason, when the disk or the file fails.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file, creating it (for this user alone) and its directories where need be.

        Raises `LocalError` for a path that cannot be written, a file that holds something else, or
        one that a newer version made.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.touch(mode=0o600, exist_ok=False)  # SQLite's other files take over its mode
            connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
        except (OSError, sqlite3.Error) as error:
            raise LocalError(f"cannot open the ledger {path}: {error}") from error
        ledger = cls(path, connection)
        try:
            ledger._prepare()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file. A second time does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Proven --------------------------------------------------------------------------------------

    def add_proof(
        self,
        proof_id: str,
        *,
        kind: str,
        role: str,
        culprit: str,
        job: str,
        step: int,
        segment: int,
        data: bytes,
        now: float,
    ) -> bool:
        """Keep a proof; False, and the first one stays, if its id was known already."""
        added = self._execute(
            "INSERT INTO proofs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO NOTHING RETURNING id",
            (proof_id, kind, role, culprit, job, step, segment, now, data),
        )
        return bool(added)

    def proof(self, proof_id: str) -> bytes | None:
        """The evidence of a proof."""
        rows = self._execute("SELECT data FROM proofs WHERE id = ?", (proof_id,))
        return rows[0][0] if rows else None

    def proofs(self, since: float = 0.0) -> list[ProofEntry]:
        """Proofs from `since` on, oldest first."""
        names = ProofEntry.__slots__
        rows = self._execute(
            f"SELECT {', '.join(names)} FROM proofs WHERE at >= ? ORDER BY at, rowid", (since,)
        )
        return [ProofEntry(**dict(zip(names, row, strict=True))) for row in rows]

    def banned(self, now: float, ban_s: float) -> dict[str, str]:
        """Hotkeys of miners with a proof younger than `ban_s`, each with the id of the latest."""
        return dict(
            self._execute(
                "SELECT culprit, id FROM proofs WHERE role = 'miner' AND ? - at < ?"
                " ORDER BY at, rowid",
                (now, ban_s),
            )
        )

    # Unavailable ---------------------------------------------------------------------------------

    def add_unavailable(
        self, *, role: str, hotkey: str, job: str, step: int, segment: int, what: str, now: float
    ) -> None:
        """Note that a peer or a miner did not give what it should have."""
        peer = hotkey if role == "peer" else None
        miner = hotkey if role == "miner" else None
        self._add_entry("unavailable", (peer, miner, job, step, segment, what), now)

    def unavailable(self, since: float = 0.0) -> list[UnavailableEntry]:
        """What was not given from `since` on, oldest first."""
        return [
            UnavailableEntry(role="miner", hotkey=miner, **rest)
            if peer is None
            else UnavailableEntry(role="peer", hotkey=peer, **rest)
            for peer, miner, rest in self._entries("unavailable", since)
        ]

    # Unattributed --------------------------------------------------------------------------------

    def add_dispute(
        self, *, peer: str, miner: str, job: str, step: int, segment: int, what: str, now: float
    ) -> None:
        """Note that two contradict each other; once per segment of a step, the first one stays."""
        self._add_entry("unattributed", (peer, miner, job, step, segment, what), now)

    def disputes(self, since: float = 0.0) -> list[DisputeEntry]:
        """Disputes from `since` on, oldest first."""
        return [
            DisputeEntry(peer=peer, miner=miner, **rest)
            for peer, miner, rest in self._entries("unattributed", since)
        ]

    def disputed(self, since: float) -> list[tuple[str, str]]:
        """The pairs (peer, miner) that have had a dispute from `since` on."""
        return self._execute(
            "SELECT DISTINCT peer, miner FROM entries WHERE ledger = 'unattributed' AND at >= ?",
            (since,),
        )

    # Jobs ----------------------------------------------------------------------------------------

    def add_job(self, job: str, data: str, now: float) -> None:
        """Keep what is known of a granted job, as text; jobs older than `KEEP_JOBS_S` go."""
        self._execute("DELETE FROM jobs WHERE at < ?", (now - KEEP_JOBS_S,))
        self._execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", (job, now, data))

    def job(self, job: str) -> str | None:
        """What is known of the job."""
        rows = self._execute("SELECT data FROM jobs WHERE job = ?", (job,))
        return rows[0][0] if rows else None

    # ---------------------------------------------------------------------------------------------
    # Any in what follows: the columns of a row, which the schema types.

    def _add_entry(self, ledger: str, columns: tuple[Any, ...], now: float) -> None:
        # Not "INSERT OR IGNORE", which would pass over the CHECKs as well.
        self._execute(
            "INSERT INTO entries (at, ledger, peer, miner, job, step, segment, what)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (now, ledger, *columns),
        )

    def _entries(self, ledger: str, since: float) -> list[tuple[Any, Any, dict[str, Any]]]:
        names = ("job", "step", "segment", "what", "at")
        rows = self._execute(
            f"SELECT peer, miner, {', '.join(names)} FROM entries WHERE ledger = ? AND at >= ?"
            " ORDER BY at, rowid",
            (ledger, since),
        )
        return [(row[0], row[1], dict(zip(names, row[2:], strict=True))) for row in rows]

    def _execute(self, statement: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, arguments).fetchall()
        except sqlite3.Error as error:
            raise LocalError(f"the ledger {self.path} failed: {error}") from error

    def _prepare(self) -> None:
        if self._is_new():
            self._execute("PRAGMA journal_mode = WAL")
            self._execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                self._execute(statement)
            self._execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._execute("COMMIT")
        # A killed process loses nothing; a power cut may take the last entries, never the file.
        self._execute("PRAGMA synchronous = NORMAL")

    def _is_new(self) -> bool:
        """True for an empty file; raises `LocalError` for one that this version cannot use."""
        ((tables,),) = self._execute("SELECT COUNT(*) FROM sqlite_master")
        ((version,),) = self._execute("PRAGMA user_version")
        ((application_id,),) = self._execute("PRAGMA application_id")
        if application_id == 0 and version == 0 and tables == 0:
            return True
        if application_id != APPLICATION_ID:
            raise LocalError(f"{self.path} is a database of another program, not a ledger")
        if version > SCHEMA_VERSION:
            raise LocalError(
                f"the ledger {self.path} has schema version {version}, this program knows "
                f"{SCHEMA_VERSION}; use the version that made it, or another file"
            )
        return False
