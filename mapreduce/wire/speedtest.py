"""A miner's speed test: the answer that tells of it, and what the public tool prints.

Knows fields, bounds and when the next test may start; knows nothing of processes, HTTP or scores,
in which a speed test counts for nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mapreduce.errors import BadMessage
from mapreduce.wire.messages import decode_message

EVERY_S = 6 * 3600.0  # a test of a fast link moves some 500 MB over it
RETRY_S = 600.0  # after one that failed
MAX_OUTPUT_BYTES = 64 * 1024
MAX_NAME = 128
MAX_REASON = 256
NO_PING_S = 600.0  # the tool counts a request without an answer as one of 3600 s, and adds up six

_STRICT = ConfigDict(extra="ignore", strict=True)
_PRIVATE = re.compile(r"\S+://\S+|(?<!\S)[~/]\S+")  # an operator's own server, a miner's machine
_PASSWORD = re.compile(r"(?<=://)[^/\s]+(?=@)")

State = Literal["never", "running", "done", "failed"]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=MAX_NAME)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTestServer:
    """Whom the tool measured against, as it says; "" for what it does not say."""

    __pydantic_config__ = _STRICT

    name: Name
    sponsor: Name
    country: Name
    host: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTestAnswer:
    """A miner's last speed test. Its own word, and information only: it never enters a score.

    Times are seconds of the Unix epoch: `at` is when the test began, `next_at` from when another
    may. `reason` says why a test has failed. The figures are there once `state` is `done`; `ping_s`
    is None also if the server has left a ping unanswered.
    """

    __pydantic_config__ = _STRICT

    state: State
    at: Time | None = None
    next_at: Time | None = None
    download_bits_per_s: Rate | None = None
    upload_bits_per_s: Rate | None = None
    ping_s: Annotated[float, Field(ge=0, le=NO_PING_S, allow_inf_nan=False)] | None = None
    server: SpeedTestServer | None = None
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolServer:
    """The server in the tool's output: of a Mini server it knows no more than a name."""

    __pydantic_config__ = _STRICT

    name: str = ""
    sponsor: str = ""
    country: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutput:
    """What `speedtest --json` prints, without what is nobody's business: address and place of the
    miner. Rates in bits per second, `ping` in ms."""

    __pydantic_config__ = _STRICT

    download: Rate
    upload: Rate
    ping: Rate
    server: ToolServer


NEVER = SpeedTestAnswer(state="never")


def running(at: float) -> SpeedTestAnswer:
    """A test that began at `at`."""
    return SpeedTestAnswer(state="running", at=at)


def done(output: bytes, at: float) -> SpeedTestAnswer:
    """What the tool has measured in the test that began at `at`. Raises BadMessage if its output
    cannot be read, or says that the server did not answer."""
    if len(output) > MAX_OUTPUT_BYTES:
        raise BadMessage(f"an output of more than {MAX_OUTPUT_BYTES} bytes", who="speedtest-cli")
    try:
        told = decode_message(ToolOutput, output)
    except BadMessage as error:
        raise BadMessage(str(error), who="speedtest-cli") from None
    if not told.download or not told.upload:  # its threads keep their errors to themselves
        raise BadMessage(
            f"download {told.download:g}, upload {told.upload:g} bit/s: the server did not answer",
            who="speedtest-cli",
        )
    ping_s = told.ping / 1e3
    server = told.server
    return SpeedTestAnswer(
        state="done",
        at=at,
        next_at=at + EVERY_S,
        download_bits_per_s=told.download,
        upload_bits_per_s=told.upload,
        ping_s=None if ping_s >= NO_PING_S else ping_s,
        server=SpeedTestServer(
            name=_name(server.name.rpartition("@")[2]),  # a Mini server: HOST:PORT of its URL
            sponsor=_name(server.sponsor),
            country=_name(server.country),
            host=_name(server.host),
        ),
    )


def failed(reason: str, at: float) -> SpeedTestAnswer:
    """A test that began at `at` and measured nothing; addresses and paths in `reason` are left
    out."""
    told = _PRIVATE.sub("..", " ".join(reason.split()))[:MAX_REASON]
    return SpeedTestAnswer(state="failed", at=at, next_at=at + RETRY_S, reason=told)


def loggable(reason: str) -> str:
    """A reason as the miner's own log may keep it: without the password in a URL."""
    return _PASSWORD.sub("..", " ".join(reason.split()))


def may_start(last: SpeedTestAnswer, now: float) -> bool:
    """Whether a test may begin at `now`, after the `last`."""
    if last.state == "running":
        return False
    if last.next_at is None or last.at is None:
        return True
    return not last.at <= now < last.next_at  # before `at`: the clock has been set back


def _name(text: str) -> str:
    """What a stranger calls itself, within bounds and fit for a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_NAME])
