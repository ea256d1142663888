"""What a collective took, in the units people read. Pure: a committed step and its seconds in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.wire.messages import MinerAddress
    from mapreduce.wire.peer_step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerTraffic:
    """Payload bytes between this peer and one miner in one step."""

    uid: int
    hotkey: str
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one collective took at this peer.

    `tensor_bytes` is the size of the tensor; `bytes_up` and `bytes_down` are payload on the wire,
    `mbit_per_s_up` and `_down` the same in 10^6 bits per second of `seconds`, from the call to the
    commit.
    """

    step: int
    op: str
    tensor_bytes: int
    seconds: float
    bytes_up: int
    bytes_down: int
    mbit_per_s_up: float
    mbit_per_s_down: float
    miners: tuple[MinerTraffic, ...]

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """The same as JSON types."""
        return asdict(self)


def measure(step: Step, miners: Sequence[MinerAddress], seconds: float) -> StepReport:
    """The report of a committed step that took `seconds` from the call to the commit."""
    traffic = tuple(
        MinerTraffic(
            uid=miner.uid,
            hotkey=miner.hotkey,
            bytes_up=step.uploads[index].sent,
            bytes_down=step.received[index],
        )
        for index, miner in enumerate(miners)
    )
    up, down = sum(m.bytes_up for m in traffic), sum(m.bytes_down for m in traffic)
    return StepReport(
        step=step.number,
        op=step.op.label,
        tensor_bytes=step.tensor.nbytes if step.tensor else 0,
        seconds=seconds,
        bytes_up=up,
        bytes_down=down,
        mbit_per_s_up=up * 8e-6 / seconds,
        mbit_per_s_down=down * 8e-6 / seconds,
        miners=traffic,
    )
