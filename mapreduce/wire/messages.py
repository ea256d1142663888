"""The JSON bodies of the control plane. Knows their fields and bounds; knows nothing of HTTP or who
signs.

Ranks are indexes from 0 here. Unknown fields are ignored, so that a newer minor version may add
some; anything missing, of another type or out of bounds is a BadMessage that names the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mapreduce.errors import BadMessage
from mapreduce.wire.terms import MAX_BANDWIDTH, MAX_MINERS, MAX_PEERS, Terms

MAX_MESSAGE_BYTES = 128 * 1024
JOB_ID_PATTERN = "^[0-9a-f]{32}$"

_STRICT = ConfigDict(extra="ignore", strict=True)

Text = Annotated[str, Field(max_length=1024)]
Address = Annotated[str, Field(pattern="^[1-9A-HJ-NP-Za-km-z]{46,50}$")]  # ss58
JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]
ProofId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Rank = Annotated[int, Field(ge=0, lt=MAX_PEERS)]
Uid = Annotated[int, Field(ge=0, lt=1 << 16)]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """A peer asks its validator for a place in a job.

    Ranks meet by `job`, a name that the user chose, or else by hotkey. `bandwidth` is the largest
    collective in bytes; `miner_count` None leaves the choice to the validator; `session_key` is the
    ed25519 address that signs for this peer from now on, and `delegation` the hotkey's signature
    that says so (`statements.session_key_statement`); `audit` is whether the validator may see
    samples of the data; the answer comes within `timeout_s`.
    """

    __pydantic_config__ = _STRICT

    rank: Rank
    peer_count: Annotated[int, Field(ge=1, le=MAX_PEERS)]
    bandwidth: Annotated[int, Field(ge=1, le=MAX_BANDWIDTH)]
    miner_count: Annotated[int, Field(ge=1, le=MAX_MINERS)] | None
    session_key: Address
    delegation: Signature
    audit: bool
    job: Annotated[str, Field(max_length=64)]
    timeout_s: Annotated[float, Field(gt=0, le=3600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerAddress:
    """Who reduces one segment, and where it listens."""

    __pydantic_config__ = _STRICT

    uid: Uid
    hotkey: Address
    ip: Annotated[str, Field(max_length=45)]
    port: Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a validator grants to a job: its peers by session key, its miners in segment order, its
    limits.

    Times are seconds of the Unix epoch. `audit_budget` is the share of a segment's traffic that
    audits may add. The object travels as a `SignedGrant`.
    """

    __pydantic_config__ = _STRICT

    version: Text
    job: JobId
    netuid: Uid
    validator: Address
    created_at: float
    expires_at: float
    bandwidth: int
    window_bytes: int
    frame_bytes: int
    session_keys: Annotated[list[Address], Field(min_length=1, max_length=MAX_PEERS)]
    miners: Annotated[list[MinerAddress], Field(min_length=1, max_length=MAX_MINERS)]
    audit_budget: Annotated[float, Field(ge=0, le=1)]

    @property
    def terms(self) -> Terms:
        """The limits for the sessions. Raises BadMessage if they cannot make a job."""
        try:
            return Terms(
                peer_count=len(self.session_keys),
                miner_count=len(self.miners),
                bandwidth=self.bandwidth,
                window_bytes=self.window_bytes,
                frame_bytes=self.frame_bytes,
            )
        except ValueError as error:
            raise BadMessage(f"grant of job {self.job}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedGrant:
    """A `Grant` as the exact text that the validator's hotkey signed."""

    __pydantic_config__ = _STRICT

    grant: Annotated[str, Field(max_length=MAX_MESSAGE_BYTES)]
    signature: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMember:
    """Who joined as a rank: a hotkey, and its word for the session key in the grant."""

    __pydantic_config__ = _STRICT

    hotkey: Address
    delegation: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedJob:
    """What a validator keeps of a job: the grant as it was first signed, its members by rank, and
    whether they let samples be taken."""

    __pydantic_config__ = _STRICT

    signed: SignedGrant
    members: Annotated[list[JobMember], Field(min_length=1, max_length=MAX_PEERS)]
    audit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerStatus:
    """What a miner has room for. Not evidence of anything: it never enters a score. `draining`: it
    takes no jobs just now, since it is starting or will be updated."""

    __pydantic_config__ = _STRICT

    version: Text
    jobs: Count
    max_jobs: Count
    memory_free_bytes: Count
    memory_limit_bytes: Count
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The answer to an offer, a release and a renewal that were carried out."""

    __pydantic_config__ = _STRICT

    job: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A peer tells its validator how steps end when something broke, and asks what others told.

    `committed_step` is the last step this peer saw commit, `step` the one it reports on.
    """

    __pydantic_config__ = _STRICT

    grant: SignedGrant
    rank: Rank
    step: Count
    committed_step: Count
    outcome: Literal["committed", "failed", "in_doubt"]
    lost_miners: Annotated[list[Uid], Field(max_length=MAX_MINERS)]
    message: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportAnswer:
    """The last step that any rank of the job reported as committed, and those reported as
    failed."""

    __pydantic_config__ = _STRICT

    committed_step: Count
    failed_steps: Annotated[list[Count], Field(max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCompletion:
    """A `statements.Completion` and its rank's signature, in hex."""

    __pydantic_config__ = _STRICT

    content: Annotated[str, Field(pattern="^(?:[0-9a-f]{2})+$", max_length=32 * 1024)]
    signature: Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispute:
    """In this step a rank and the miner of this segment say different things, and neither can
    prove that it is right. `reject`, statement and signature in hex, shows that the miner rejects
    what `rank` sent; without it only the rank itself may say so."""

    __pydantic_config__ = _STRICT

    step: Count
    segment: Annotated[int, Field(ge=0, lt=MAX_MINERS)]
    rank: Rank
    what: Text
    reject: Annotated[str, Field(pattern="^(?:[0-9a-f]{2})*$", max_length=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBatch:
    """A peer tells its validator how steps have ended; steps may be told of more than once."""

    __pydantic_config__ = _STRICT

    rank: Rank
    completions: Annotated[list[SignedCompletion], Field(max_length=256)]
    disputes: Annotated[list[Dispute], Field(max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedOpenings:
    """What the validator asks for: `openings` of the step's sample, or a certificate alone."""

    __pydantic_config__ = _STRICT

    step: Count
    segment: Annotated[int, Field(ge=0, lt=MAX_MINERS)]
    openings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditAnswer:
    """What the validator wants to see, the proofs of lies in this job that it knows of, and whether
    steps that this peer told of are still being audited, so that more may come."""

    __pydantic_config__ = _STRICT

    wants: Annotated[list[WantedOpenings], Field(max_length=1024)]
    proofs: Annotated[list[ProofId], Field(max_length=64)]
    pending: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetail:
    """Why a request was refused: `code` for programs, `message` for people."""

    __pydantic_config__ = _STRICT

    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """The body of every answer that is not a success."""

    __pydantic_config__ = _STRICT

    error: ErrorDetail


_adapters: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:  # Any: each adapter is of its own type
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def encode_message(message: object) -> bytes:
    """A message as JSON."""
    data: bytes = _adapter(type(message)).dump_json(message)
    assert len(data) <= MAX_MESSAGE_BYTES
    return data


def decode_message(kind: type[Message], data: bytes | str) -> Message:
    """The message in `data`. Raises BadMessage naming the first field that is wrong."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"{kind.__name__} of {len(data)} bytes: at most {MAX_MESSAGE_BYTES}")
    try:
        message: Message = _adapter(kind).validate_json(data)
        return message
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise BadMessage(f"{kind.__name__}: {where}: {first['msg']}") from None
