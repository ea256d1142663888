"""What is written to and read from a validator's history. Knows the shape of the records only.

Times are Unix seconds; a hotkey is its ss58 address; `*_json` is text that the caller makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Result = Literal["set", "dry run", "refused", "unreachable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A neuron as the chain shows it now; `ip` is None where it serves nothing."""

    uid: int
    hotkey: str
    coldkey: str
    ip: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A hotkey that is or was registered: `uid` is None if it has none now, `ip` is its last."""

    hotkey: str
    uid: int | None
    coldkey: str
    ip: str | None
    last_seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a benchmark job showed of one miner; void: by no fault of the miner, it shows nothing.

    `bytes` is all that the bots moved with it, in and out; `goodput_bytes_per_s` of a failed one
    is 0. `latency_s` is the time to the first reduced byte.
    """

    at: float
    window: int
    job: str
    hotkey: str
    outcome: Literal["measured", "failed", "void"]
    goodput_bytes_per_s: float
    latency_s: float | None
    seconds: float
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a real job, owned by coldkey `owner`, has shown of one miner so far.

    `ratio` is its speed relative to what it should have been, None if the job cannot tell.
    """

    job: str
    owner: str
    hotkey: str
    completed: int
    failed: int
    ratio: float | None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One hotkey's score of one window."""

    rank: int
    score: float
    weight: float
    components_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One attempt at setting weights, and how it ended."""

    at: float
    block: int
    vector_json: str
    result: Result
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """What is left of one hotkey's day (Unix seconds // 86400) once its raw rows are gone.

    The goodput is over the slots that measured it, None without one; score and weight are means
    over `windows`, None without one.
    """

    day: int
    hotkey: str
    measured: int
    failed: int
    void: int
    seconds: float
    bytes: int
    goodput_min_bytes_per_s: float | None
    goodput_mean_bytes_per_s: float | None
    goodput_max_bytes_per_s: float | None
    windows: int
    score: float | None
    weight: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """One row of the leaderboard: a score of the newest window and what belongs to it.

    `measured_at` and the goodput are of the last measurement that was not void, None without one;
    `strikes` are ids of proofs against it, newest first.
    """

    hotkey: str
    uid: int | None
    ip: str | None
    rank: int
    score: float
    weight: float
    components_json: str
    measured_at: float | None
    goodput_bytes_per_s: float | None
    strikes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerHistory:
    """One hotkey over time, oldest first: recent days raw, older ones as `days`.

    `scores` holds (window, when it was closed, score).
    """

    measurements: tuple[Measurement, ...]
    outcomes: tuple[Outcome, ...]
    scores: tuple[tuple[int, float, Score], ...]
    days: tuple[Day, ...]
