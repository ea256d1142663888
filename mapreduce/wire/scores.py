"""What a validator tells a miner of its score, signed.

Knows fields and bounds, and the bytes that are signed; knows nothing of routes, nor how a score is
made. Nothing in it says which job was a benchmark: no job is named, and times are those of windows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mapreduce.core.scoring import Components
from mapreduce.wire.messages import (
    MAX_MESSAGE_BYTES,
    Address,
    Count,
    ProofId,
    Signature,
    Text,
    Uid,
    decode_message,
)

_STRICT = ConfigDict(extra="ignore", strict=True)

MAX_MEASUREMENTS = 32
MAX_STRIKES = 32
MAX_REASON = 256  # characters

Reason = Annotated[str, Field(max_length=MAX_REASON)]
Status = Literal["scored", "not scored yet", "banned", "not registered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScore:
    """The score of the window that was closed last: its place among `miners`, and why."""

    __pydantic_config__ = _STRICT

    rank: Annotated[int, Field(ge=1)]
    miners: Annotated[int, Field(ge=1)]
    components: Components


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one benchmark has shown. `window_at` is when its window began: the exact time would tell
    a miner which of its jobs was the benchmark, and so which addresses are bots'."""

    __pydantic_config__ = _STRICT

    window: Count
    window_at: float
    outcome: Literal["measured", "failed", "void"]
    goodput_bytes_per_s: Annotated[float, Field(ge=0)]
    latency_s: float | None
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A proof against the hotkey: anybody may fetch its evidence by `proof`, while it is kept."""

    __pydantic_config__ = _STRICT

    proof: ProofId
    kind: Text
    role: Literal["peer", "miner"]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """No pay until then, for this proof: against the hotkey itself, or against one that shares its
    coldkey or address."""

    __pydantic_config__ = _STRICT

    proof: ProofId
    own: bool
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSet:
    """Weights that are on the chain, or would be but for a dry run; `weight` is this hotkey's."""

    __pydantic_config__ = _STRICT

    at: float
    block: Count
    dry_run: bool
    weight: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFailed:
    """Why weights could not be set."""

    __pydantic_config__ = _STRICT

    at: float
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFeedback:
    """All that a validator holds for and against one hotkey, at Unix second `at`.

    `window` is the one that was closed last, at `window_closed_at`; `score` is what it ended with.
    `cap_bytes_per_s` (in and out) is the most that the validator's bots can measure: miners above
    it are tied. `measurements` are of closed windows only, newest first, as are the `strikes`;
    `disputes` counts the peers that contradict the hotkey in the last day, without a proof.
    """

    __pydantic_config__ = _STRICT

    validator: Address
    hotkey: Address
    netuid: Uid
    uid: Uid | None
    at: float
    status: Status
    window: Count | None
    window_closed_at: float | None
    score: WindowScore | None
    cap_bytes_per_s: float
    measurements: Annotated[list[Measured], Field(max_length=MAX_MEASUREMENTS)]
    ban: Ban | None
    strikes: Annotated[list[Strike], Field(max_length=MAX_STRIKES)]
    disputes: Count
    weights: WeightsSet | None
    weights_failed: WeightsFailed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedScore:
    """A `ScoreFeedback` as the exact text that the validator's hotkey signed."""

    __pydantic_config__ = _STRICT

    score: Annotated[str, Field(max_length=MAX_MESSAGE_BYTES)]
    signature: Signature


def score_statement(text: str) -> bytes:
    """What a validator signs of a score: its text, in the form of `wire/statements.py`."""
    return b"mapreduce/1 score\n" + text.encode()


def read_components(factors_json: str, *, score: float, weight: float) -> Components:
    """A score as it is stored: its factors as text, beside it. Raises BadMessage."""
    factors: dict[str, Any] = json.loads(factors_json)
    return decode_message(Components, json.dumps(factors | {"score": score, "weight": weight}))
