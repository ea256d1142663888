"""The tables of a validator's state, as the steps that make them.

Knows the SQL of every version. A new file takes all steps, a file of an older version those that it
lacks, so the two end with the same tables. A step that a release has shipped never changes.
"""

from __future__ import annotations

from typing import Final

APPLICATION_ID: Final = 0x4D524C31  # "MRL1" in the file's header: tells our files from foreign ones

_VERSION_1: Final = (
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

_VERSION_2: Final = (
    "CREATE INDEX jobs_at ON jobs (at)",
    # All columns of the query: with `job` alone SQLite prefers `entries_at`, which reads all jobs.
    "CREATE INDEX entries_job ON entries (job, ledger, at)",
    "CREATE INDEX proofs_job ON proofs (job, at)",
    "CREATE INDEX proofs_culprit ON proofs (culprit, at)",
    # Proofs whose evidence is still here; evidence that went leaves an empty blob.
    "CREATE INDEX proofs_kept ON proofs (at) WHERE length(data) > 0",
    # The other tables name a hotkey by `id`: 2 bytes in a row instead of 48.
    "CREATE TABLE neurons (id INTEGER PRIMARY KEY NOT NULL, hotkey TEXT NOT NULL UNIQUE,"
    " uid INTEGER UNIQUE, coldkey TEXT, ip TEXT, last_seen REAL)",
    "CREATE TABLE measurements (at REAL NOT NULL, window INTEGER NOT NULL, job TEXT NOT NULL,"
    " miner INTEGER NOT NULL,"
    " outcome TEXT NOT NULL CHECK (outcome IN ('measured', 'failed', 'void')),"
    " goodput REAL NOT NULL, latency REAL, seconds REAL NOT NULL, bytes INTEGER NOT NULL,"
    " reason TEXT NOT NULL)",
    "CREATE INDEX measurements_at ON measurements (at, bytes)",  # bytes: the day's sum reads no row
    # `outcome`: the last valid measurement of a miner is found without reading the others' rows.
    "CREATE INDEX measurements_miner ON measurements (miner, at, outcome)",
    "CREATE TABLE outcomes (job TEXT NOT NULL, miner INTEGER NOT NULL, owner TEXT NOT NULL,"
    " completed INTEGER NOT NULL, failed INTEGER NOT NULL, ratio REAL, at REAL NOT NULL,"
    " PRIMARY KEY (job, miner)) WITHOUT ROWID",
    "CREATE INDEX outcomes_at ON outcomes (at)",
    "CREATE TABLE windows (window INTEGER PRIMARY KEY NOT NULL, at REAL NOT NULL)",
    "CREATE INDEX windows_at ON windows (at, window)",
    "CREATE TABLE standings (miner INTEGER PRIMARY KEY NOT NULL, standing TEXT NOT NULL)",
    "CREATE TABLE scores (window INTEGER NOT NULL, miner INTEGER NOT NULL, rank INTEGER NOT NULL,"
    " score REAL NOT NULL, weight REAL NOT NULL, components TEXT NOT NULL,"
    " PRIMARY KEY (window, miner))",
    "CREATE INDEX scores_miner ON scores (miner)",
    "CREATE TABLE days (miner INTEGER NOT NULL, day INTEGER NOT NULL,"
    " measured INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,"
    " void INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,"
    " bytes INTEGER NOT NULL DEFAULT 0, goodput_sum REAL NOT NULL DEFAULT 0,"
    " goodput_min REAL, goodput_max REAL, windows INTEGER NOT NULL DEFAULT 0,"
    " score_sum REAL NOT NULL DEFAULT 0, weight_sum REAL NOT NULL DEFAULT 0,"
    " PRIMARY KEY (miner, day)) WITHOUT ROWID",
    "CREATE TABLE weights (at REAL NOT NULL, block INTEGER NOT NULL, vector TEXT NOT NULL,"
    " result TEXT NOT NULL CHECK (result IN ('set', 'dry run', 'refused', 'unreachable')),"
    " reason TEXT NOT NULL)",
    "CREATE INDEX weights_at ON weights (at)",
    "CREATE INDEX weights_result ON weights (result, at)",
)

MIGRATIONS: Final = (_VERSION_1, _VERSION_2)
SCHEMA_VERSION: Final = len(MIGRATIONS)
