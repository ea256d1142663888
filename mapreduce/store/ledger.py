"""The validator's record of who is to blame: proven, unavailable and unattributed, never mixed; and
of the jobs that it has granted.

Knows its rows. Knows nothing of clocks (the caller says what time it is), of what makes a proof
valid, or of what an entry costs in score; bounds on strings are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from mapreduce.store.database import Database

if TYPE_CHECKING:
    from pathlib import Path

KEEP_JOBS_S: Final = 7 * 86400.0  # far longer than a grant lives
KEEP_ENTRIES_S: Final = 30 * 86400.0  # far longer than anything that counts them looks back
# Evidence is about 150 kB for eight peers: 150 MB. A lie convicts with its first proof and bans for
# days, so there are few; who is convicted, of what and when, stays for good.
KEEP_EVIDENCE: Final = 1000
_PRUNED: Final = 10_000  # rows of a kind that one call of `prune` drops at most


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
    """The ledgers in an open file.

    Each method is one transaction: it has happened entirely when it returns, and not at all when it
    raises. All raise `LocalError`, naming the file and the reason, when the disk or the file fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> Self:
        """The ledgers of a file that nothing else here needs; raises as `Database.open` does."""
        return cls(Database.open(path))

    def close(self) -> None:
        """Close the file. A second time does nothing."""
        self._database.close()

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
        added = self._database.execute(
            "INSERT INTO proofs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO NOTHING RETURNING id",
            (proof_id, kind, role, culprit, job, step, segment, now, data),
        )
        return bool(added)

    def proof(self, proof_id: str) -> bytes | None:
        """The evidence of a proof; None if there is no such proof, or no evidence any more."""
        rows = self._database.execute("SELECT data FROM proofs WHERE id = ?", (proof_id,))
        return rows[0][0] or None if rows else None

    def proofs(self, since: float = 0.0, job: str | None = None) -> list[ProofEntry]:
        """Proofs from `since` on, of all jobs or of one, oldest first."""
        where, arguments = _of_job(job)
        return self._proofs(f"{where}at >= ? ORDER BY at, rowid", (*arguments, since))

    def proof_entry(self, proof_id: str) -> ProofEntry | None:
        """What is known of a proof without its evidence, which may be gone."""
        entries = self._proofs("id = ?", (proof_id,))
        return entries[0] if entries else None

    def proofs_of(self, culprit: str, most: int) -> list[ProofEntry]:
        """The last proofs against a hotkey, newest first."""
        return self._proofs("culprit = ? ORDER BY at DESC, rowid DESC LIMIT ?", (culprit, most))

    def banned(self, now: float, ban_s: float) -> dict[str, str]:
        """Hotkeys of miners with a proof younger than `ban_s`, each with the id of the latest."""
        return dict(
            self._database.execute(
                "SELECT culprit, id FROM proofs WHERE role = 'miner' AND at > ? ORDER BY at, rowid",
                (now - ban_s,),
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

    def unavailable(self, since: float = 0.0, job: str | None = None) -> list[UnavailableEntry]:
        """What was not given from `since` on, in all jobs or in one, oldest first."""
        return [
            UnavailableEntry(role="miner", hotkey=miner, **rest)
            if peer is None
            else UnavailableEntry(role="peer", hotkey=peer, **rest)
            for peer, miner, rest in self._entries("unavailable", since, job)
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
        return self._database.execute(
            "SELECT DISTINCT peer, miner FROM entries WHERE ledger = 'unattributed' AND at >= ?",
            (since,),
        )

    def peers_disputing(self, miner: str, since: float) -> int:
        """How many peers have had a dispute with the miner from `since` on."""
        ((peers,),) = self._database.execute(
            "SELECT COUNT(DISTINCT peer) FROM entries"
            " WHERE ledger = 'unattributed' AND at >= ? AND miner = ?",
            (since, miner),
        )
        return int(peers)

    # Jobs ----------------------------------------------------------------------------------------

    def add_job(self, job: str, data: str, now: float) -> None:
        """Keep what is known of a granted job, as text; jobs older than `KEEP_JOBS_S` go."""
        with self._database.transaction():
            self._database.execute("DELETE FROM jobs WHERE at < ?", (now - KEEP_JOBS_S,))
            self._database.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", (job, now, data))

    def job(self, job: str) -> str | None:
        """What is known of the job."""
        rows = self._database.execute("SELECT data FROM jobs WHERE job = ?", (job,))
        return rows[0][0] if rows else None

    # ---------------------------------------------------------------------------------------------

    def prune(self, now: float, ban_s: float) -> int:
        """Drop a bounded number of rows that are too old; returns how many went.

        Of proofs only the evidence goes, the oldest beyond `KEEP_EVIDENCE`, and never while it is
        younger than `ban_s`: a ban must show its reason.
        """
        with self._database.transaction():
            entries = self._database.execute(
                "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries"
                " WHERE ledger IN ('unavailable', 'unattributed') AND at < ? LIMIT ?) RETURNING 1",
                (now - KEEP_ENTRIES_S, _PRUNED),
            )
            ((kept,),) = self._database.execute(
                "SELECT COUNT(*) FROM proofs WHERE length(data) > 0"
            )
            evidence = self._database.execute(
                "UPDATE proofs SET data = x'' WHERE rowid IN (SELECT rowid FROM proofs"
                " WHERE length(data) > 0 AND at <= ? ORDER BY at LIMIT ?) RETURNING 1",
                (now - ban_s, min(max(0, kept - KEEP_EVIDENCE), _PRUNED)),
            )
        return len(entries) + len(evidence)

    # Any in what follows: the columns of a row, which the schema types.

    def _proofs(self, where: str, arguments: tuple[Any, ...]) -> list[ProofEntry]:
        names = ProofEntry.__slots__
        rows = self._database.execute(
            f"SELECT {', '.join(names)} FROM proofs WHERE {where}", arguments
        )
        return [ProofEntry(**dict(zip(names, row, strict=True))) for row in rows]

    def _add_entry(self, ledger: str, columns: tuple[Any, ...], now: float) -> None:
        # Not "INSERT OR IGNORE", which would pass over the CHECKs as well.
        self._database.execute(
            "INSERT INTO entries (at, ledger, peer, miner, job, step, segment, what)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (now, ledger, *columns),
        )

    def _entries(
        self, ledger: str, since: float, job: str | None = None
    ) -> list[tuple[Any, Any, dict[str, Any]]]:
        names = ("job", "step", "segment", "what", "at")
        where, arguments = _of_job(job)
        rows = self._database.execute(
            f"SELECT peer, miner, {', '.join(names)} FROM entries"
            f" WHERE {where}ledger = ? AND at >= ? ORDER BY at, rowid",
            (*arguments, ledger, since),
        )
        return [(row[0], row[1], dict(zip(names, row[2:], strict=True))) for row in rows]


def _of_job(job: str | None) -> tuple[str, tuple[str, ...]]:
    """The start of a condition, and its arguments."""
    return ("", ()) if job is None else ("job = ? AND ", (job,))
