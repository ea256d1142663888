"""The JSON bodies between a validator and its benchmark bots. Knows their fields and bounds; knows
nothing of HTTP, nor of what a measurement is worth.

What a bot is told never reaches a miner: to those, a benchmark is a job like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mapreduce.wire.messages import Count, JobId, Rank, Text, Uid  # noqa: TC001 (pydantic's)
from mapreduce.wire.terms import MAX_BANDWIDTH, MAX_MINERS, MAX_PEERS

_STRICT = ConfigDict(extra="ignore", strict=True)

MAX_STEPS = 200
MAX_STEP_NUMBERS = 1000  # segments of all steps in one report: it must fit a control request
MAX_WHAT = 96  # characters: all miners of a job may be blamed at once

Seed = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBenchmark:
    """A bot is free; the answer comes within `wait_s`, with or without a benchmark."""

    __pydantic_config__ = _STRICT

    wait_s: Annotated[float, Field(gt=0, le=60)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One job for a bot: join by the name `job` as `rank`, and all-reduce tensors made from `seed`.

    With `broadcast` the first rank sends a tensor to all before that, as trainers do. Every step
    averages `tensor_bytes` of float32; the bots make steps until those have taken `seconds` by what
    all ranks acknowledged, or there were `steps`; a bot leaves a job that lasts `longest_s`. It
    uploads no faster than `bytes_per_s`, and waits `pause_s` before the next step, as one who
    trains computes. A step that takes `step_timeout_s` has failed.
    """

    __pydantic_config__ = _STRICT

    job: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    rank: Rank
    peer_count: Annotated[int, Field(ge=1, le=MAX_PEERS)]
    tensor_bytes: Annotated[int, Field(ge=4, le=MAX_BANDWIDTH, multiple_of=4)]
    seed: Seed
    broadcast: bool
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    seconds: Annotated[float, Field(gt=0, le=600)]
    longest_s: Annotated[float, Field(gt=0, le=3600)]
    pause_s: Annotated[float, Field(ge=0, le=600)]
    bytes_per_s: Annotated[float, Field(gt=0)]
    join_timeout_s: Annotated[float, Field(gt=0, le=3600)]
    step_timeout_s: Annotated[float, Field(gt=0, le=3600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkAnswer:
    """What a free bot is to do, None for nothing yet."""

    __pydantic_config__ = _STRICT

    benchmark: Benchmark | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTime:
    """A miner's part of one step that this bot has recomputed: payload bytes each way, and the
    microseconds from the bot's entry to the segment's first result, and to its last word."""

    __pydantic_config__ = _STRICT

    uid: Uid
    nbytes: Count
    first_us: Count
    last_us: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What a miner did wrong, as this bot saw it.

    `lost`: its connection broke or was never opened. `stalled`: it did not do its part in time.
    `aborted`: it told that a step is over, and this bot knows of no reason. `wrong`: it returned
    what was not the sum. `disputed`: it and a bot say different things of the same bytes.
    """

    __pydantic_config__ = _STRICT

    uid: Uid
    kind: Literal["lost", "stalled", "aborted", "wrong", "disputed"]
    what: Annotated[str, Field(max_length=MAX_WHAT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkReport:
    """How a benchmark went at one bot. `granted` is the job that came of it, empty if none did.

    `error` says why it ended early; where no miner is blamed for that, the bots are.
    """

    __pydantic_config__ = _STRICT

    job: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    rank: Rank
    granted: JobId | Literal[""]
    steps: Annotated[
        list[Annotated[list[SegmentTime], Field(max_length=MAX_MINERS)]],
        Field(max_length=MAX_STEPS),
    ]
    blames: Annotated[list[Blame], Field(max_length=MAX_MINERS)]
    error: Text
