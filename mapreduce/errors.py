"""Every error a caller may meet, named by whose fault it is and carrying the facts as attributes.

Knows the texts a person reads; ranks in them count from 1, as in `Peer`.

    MapReduceError
    +-- LocalError                 this process was used or configured wrongly; retrying cannot help
    |   +-- ConfigError            a flag, variable or key: names it, its value and what is allowed
    |   +-- WalletError            wallet missing, unreadable, or wrong password
    |   +-- InvalidArgument        (also ValueError) an argument out of range; names it
    |   +-- NotRegistered          the hotkey is not on the subnet; names the command that registers
    it
    |   +-- PortInUse              the address to listen on is taken
    |   +-- UnsupportedTensor      (also TypeError) CUDA, sparse, grad-requiring, dtype without a
    kernel
    |   +-- TensorTooLarge         (also ValueError) more bytes than the job's `bandwidth`
    |   +-- JobClosed              used before init, after destroy, or in a forked child
    +-- RemoteError                another party broke the protocol
    |   +-- BadFrame               bytes of the bulk stream that the protocol forbids
    |   +-- BadMessage             a control message that is malformed, oversized or not signed as
    it must be
    +-- Refused                    another party said no and gave a reason
    |   +-- JobRefused             the validator grants no job: missing ranks, too few miners, over
    quota
    |   +-- VersionMismatch        incompatible major versions; names both
    +-- StepFailed                 one collective failed on every rank; tensors are untouched
    |   +-- CollectiveMismatch     ranks disagree on op, dtype or step order; names ranks and
    difference
    |   |   +-- ShapeMismatch      ... on shape
    |   +-- PeerLost               a rank went away inside a step
    |   +-- StepAborted            a rank gave up the step: Ctrl+C, timeout, an error of its own
    |   +-- IntegrityError         what a party has signed does not fit the data
    |       +-- MinerFraud         ... proven against a miner; names it and the proof's file
    |       +-- PeerFraud          ... proven against a rank; names it and the proof's file
    |       +-- ResultDisputed     ... and nobody can prove who is wrong; names the miner
    |       +-- CertificateConflict    ... ranks saw different results; the validator finds out why
    +-- Unavailable                nobody is proven guilty: timeout, refused connection
        +-- MinerLost              the stream to a miner broke; names uid, hotkey and segment
        +-- PeerTimeout            a rank did not enter or finish the step in time
        +-- ValidatorUnreachable   no answer from the validator's axon
        +-- ChainUnavailable       no answer from the chain
        |   +-- ChainStalled       ... or no new block, for so long that the neuron has stopped
        +-- StepInDoubt            a miner was lost between acknowledgement and commit
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class MapReduceError(Exception):
    """Root of every error this project raises on purpose. All of them survive pickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take facts, not the message: the default would call them with the message.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[MapReduceError], args: tuple[Any, ...], facts: dict[str, Any]
) -> MapReduceError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class LocalError(MapReduceError):
    """This process was used or configured wrongly."""


class ConfigError(LocalError):
    """A flag, environment variable or key of the configuration file cannot be used."""


class WalletError(LocalError):
    """A wallet is missing, unreadable or locked with another password."""


class InvalidArgument(LocalError, ValueError):
    """An argument of the public API cannot be used."""


class NotRegistered(LocalError):
    """The hotkey has no uid on the subnet."""


class PortInUse(LocalError):
    """The address to listen on is taken by another process."""

    def __init__(self, ip: str, port: int) -> None:
        super().__init__(
            f"cannot listen on {ip}:{port}: the port is in use; "
            "stop the other process or choose another with --axon.port"
        )
        self.ip = ip
        self.port = port


class UnsupportedTensor(LocalError, TypeError):
    """A tensor that the data plane cannot carry as it is."""


class TensorTooLarge(LocalError, ValueError):
    """A tensor has more bytes than the job was granted for one collective."""

    def __init__(self, tensor_bytes: int, bandwidth: int) -> None:
        super().__init__(
            f"the tensor has {tensor_bytes} bytes, but this job was opened with "
            f"bandwidth={bandwidth} (the largest collective in bytes); open it with a larger one "
            "or split the tensor"
        )
        self.tensor_bytes = tensor_bytes
        self.bandwidth = bandwidth


class JobClosed(LocalError):
    """The peer has no job: not initialised yet, destroyed, failed, or inherited by a fork."""


class RemoteError(MapReduceError):
    """Another party broke the protocol; `who` names it where that is known."""

    def __init__(self, message: str, *, who: str | None = None) -> None:
        super().__init__(f"{who}: {message}" if who else message)
        self.who = who


class BadFrame(RemoteError):
    """Bytes of the bulk stream that the protocol forbids."""


class BadMessage(RemoteError):
    """A control message that is malformed, oversized or not signed as it must be."""


class Refused(MapReduceError):
    """Another party answered no; `code` is stable, `status` the HTTP status where there is one."""

    def __init__(self, message: str, *, code: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class JobRefused(Refused):
    """The validator grants no job."""


class VersionMismatch(Refused):
    """Two parties speak incompatible major versions."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message, code="version_mismatch", status=status)


class StepFailed(MapReduceError):
    """A collective failed on every rank; the tensors are untouched.

    The job goes on with the next step, except after PeerLost.
    """


class CollectiveMismatch(StepFailed):
    """Ranks entered the same step with different arguments.

    `differences` maps the argument (`op`, `dtype`, `shape`, ...) to `{rank: what that rank said}`,
    ranks counted from 1.
    """

    def __init__(self, step: int, differences: Mapping[str, Mapping[int, str]]) -> None:
        parts = []
        for field, by_rank in differences.items():
            ranks_by_value: dict[str, list[int]] = {}
            for rank, value in sorted(by_rank.items()):
                ranks_by_value.setdefault(value, []).append(rank)
            said = ", ".join(
                f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {value}"
                for value, ranks in ranks_by_value.items()
            )
            parts.append(f"{field} ({said})")
        super().__init__(f"step {step}: the ranks disagree on {'; '.join(parts)}")
        self.step = step
        self.differences = {field: dict(by_rank) for field, by_rank in differences.items()}


class ShapeMismatch(CollectiveMismatch):
    """Ranks entered the same step with tensors of different shapes."""


class PeerLost(StepFailed):
    """A rank went away inside a step."""

    def __init__(self, rank: int, reason: str, step: int | None = None) -> None:
        where = "" if step is None else f" in step {step}"
        super().__init__(f"rank {rank} was lost{where}: {reason}")
        self.rank = rank
        self.step = step


class StepAborted(StepFailed):
    """A rank gave the step up."""

    def __init__(self, step: int, rank: int | None, reason: str) -> None:
        by = "a miner" if rank is None else f"rank {rank}"
        super().__init__(f"step {step} was aborted by {by}: {reason}")
        self.step = step
        self.rank = rank


class IntegrityError(StepFailed):
    """What a party has signed does not fit the data, or another statement of its own.

    `what` is the contradiction alone; `step` and `segment` (None: not known) say where; `proof`
    holds the evidence, empty where there is none, and `proof_path` the file it was saved to, None
    while it is not.
    """

    def __init__(
        self, message: str, what: str, *, step: int, segment: int | None, proof: bytes = b""
    ) -> None:
        super().__init__(message)
        self.what = what
        self.step = step
        self.segment = segment
        self.proof = proof
        self.proof_path: str | None = None

    def saved(self, path: str) -> None:
        """The proof is in this file now; the message says so from now on."""
        self.proof_path = path
        self.args = (f"{self.args[0]}; check it: python -m mapreduce.verify {path}",)

    def not_saved(self, reason: str) -> None:
        """The proof could not be written; the message says why."""
        self.args = (f"{self.args[0]}; its proof could not be saved: {reason}",)


class MinerFraud(IntegrityError):
    """A miner has signed what it can be proven not to be; `uid` and `hotkey` name it."""

    def __init__(
        self, uid: int, hotkey: str, what: str, *, step: int, segment: int, proof: bytes
    ) -> None:
        super().__init__(
            f"miner uid {uid} ({hotkey}) is proven to have lied in step {step}, segment "
            f"{segment}: {what}",
            what,
            step=step,
            segment=segment,
            proof=proof,
        )
        self.uid = uid
        self.hotkey = hotkey


class PeerFraud(IntegrityError):
    """A rank (from 1) has signed two things of which one is a lie."""

    def __init__(self, rank: int, what: str, *, step: int, segment: int, proof: bytes) -> None:
        super().__init__(
            f"rank {rank} is proven to have lied in step {step}, segment {segment}: {what}",
            what,
            step=step,
            segment=segment,
            proof=proof,
        )
        self.rank = rank


class ResultDisputed(IntegrityError):
    """A miner and a rank say different things of the same bytes, and neither is proven wrong.

    `uid` and `hotkey` name the miner, `rank` (from 1) who disagrees with it. `reject` is the
    miner's signed word that it received other bytes than the rank sent, empty if that is not the
    matter. `own`: this rank has seen it itself, and was not told.
    """

    def __init__(
        self,
        uid: int,
        hotkey: str,
        rank: int,
        what: str,
        *,
        step: int,
        segment: int,
        reject: bytes = b"",
        own: bool = False,
    ) -> None:
        super().__init__(
            f"step {step}, segment {segment}: miner uid {uid} ({hotkey}) and rank {rank} disagree: "
            f"{what}",
            what,
            step=step,
            segment=segment,
        )
        self.uid = uid
        self.hotkey = hotkey
        self.rank = rank
        self.reject = reject
        self.own = own


class CertificateConflict(IntegrityError):
    """Two ranks (from 1) have acknowledged different certificates of one step: a miner showed them
    different ones, or one of them lies. The validator can tell."""

    def __init__(self, ranks: tuple[int, int], *, step: int) -> None:
        super().__init__(
            f"step {step}: ranks {ranks[0]} and {ranks[1]} were shown different certificates, or "
            "one of them says so; who lied is not known yet",
            "different certificates",
            step=step,
            segment=None,
        )
        self.ranks = ranks


class Unavailable(MapReduceError):
    """No answer; nobody is proven guilty."""


class MinerLost(Unavailable):
    """The stream to a miner broke."""

    def __init__(self, uid: int, hotkey: str, segment: int, reason: str) -> None:
        super().__init__(f"miner uid {uid} ({hotkey}), segment {segment}, was lost: {reason}")
        self.uid = uid
        self.hotkey = hotkey
        self.segment = segment


class PeerTimeout(Unavailable):
    """One or more ranks did not enter or finish a step in time."""

    def __init__(self, ranks: Sequence[int], seconds: float, what: str) -> None:
        names = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
        super().__init__(f"{what} after {seconds:g} s: waiting for {names or 'unknown ranks'}")
        self.ranks = tuple(ranks)
        self.rank = ranks[0] if ranks else None
        self.seconds = seconds


class ValidatorUnreachable(Unavailable):
    """No answer from the validator's axon."""


class ChainUnavailable(Unavailable):
    """No answer from the chain."""


class ChainStalled(ChainUnavailable):
    """A neuron has stopped: for too long it has seen no new block. Starting it again may help."""


class StepInDoubt(Unavailable):
    """A miner was lost between acknowledgement and commit, and nobody reachable knows the
    outcome."""
