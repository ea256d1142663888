"""Cuts a tensor into one segment per miner. Knows bytes, blocks and weights; knows no dtype.

A pure function of its arguments, in exact arithmetic, so that all peers compute the same map.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_BYTES = 16 * 1024  # unit of reduction, hashing and audit; a multiple of every itemsize
MIN_SEGMENT_BYTES = 256 * 1024  # below this a further stream costs more than the split gains
EQUAL_WEIGHT = 1 << 20  # of each miner, before anything was measured
JUMP_RATIO = Fraction(115, 100)  # three times what equal miners' times scattered by, shaped links
MIN_MEASURED_US = 20_000  # shorter steps measure the scheduler

_DIGEST_BYTES = 16
_DIGEST_PERSON = b"mapreduce/map/1"  # at most 16 bytes, blake2b's limit
_MAP_HEADER = struct.Struct("<I")  # number of segments
_MAP_ENTRY = struct.Struct("<IQQ")  # index, offset, length


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `[offset, offset + length)` of the flattened contiguous tensor, owned by miner `index`.

    `offset` is a multiple of `BLOCK_BYTES`, unless the segment is empty: then it is the end of the
    one before and may be the end of the tensor.
    """

    index: int
    offset: int
    length: int

    @property
    def blocks(self) -> int:
        """Blocks touched, the last of the tensor perhaps a partial one."""
        return _blocks(self.length)


def partition(
    total_bytes: int,
    segment_count: int,
    *,
    first: int = 0,
    weights: Sequence[float] | None = None,
) -> tuple[Segment, ...]:
    """Cut `total_bytes` into exactly `segment_count` segments, number i for miner i.

    Byte ranges follow the miners' index, without gap or overlap; cuts fall on whole blocks, and the
    last segment that is not empty carries the partial block. Shares are in proportion to `weights`
    (equal if None) by largest remainder, so each is within one block of its exact quota; of equal
    remainders the later bytes get the block.

    No segment is shorter than `MIN_SEGMENT_BYTES` unless it is the whole tensor. To keep to that, a
    tensor too small for everyone uses the miners `first, first + 1, ...` (modulo the count; pass
    `first = step % segment_count` to spread small tensors), and then those of least weight are left
    out. A miner of weight zero gets nothing.

    Miner `first` is the *anchor* of the step: it always takes part, even with length 0 (an empty
    tensor, or its weight is too low), and it alone holds a tensor below `2 * MIN_SEGMENT_BYTES`,
    whatever its weight.

    Raises `ValueError` for a negative size, a count below 1, `first` outside the miners, or weights
    of the wrong number, negative, not finite or all zero.
    """
    scaled = _check_and_scale(total_bytes, segment_count, first, weights)
    most = total_bytes // MIN_SEGMENT_BYTES
    if most <= 1:
        used = [first]
    else:
        rotation = [(first + turn) % segment_count for turn in range(segment_count)]
        used = [miner for miner in rotation if scaled[miner] > 0][:most]
    lengths = _lengths(total_bytes, sorted(used), scaled)
    while len(used) > 1 and min(lengths.values()) < MIN_SEGMENT_BYTES:
        # Of equal weights the last in the rotation goes, so that small tensors stay spread.
        used.remove(min(reversed(used), key=lambda miner: scaled[miner]))
        lengths = _lengths(total_bytes, sorted(used), scaled)

    segments = []
    offset = 0
    for miner in range(segment_count):
        length = lengths.get(miner, 0)
        segments.append(Segment(miner, offset, length))
        offset += length
    return tuple(segments)


def rebalance(
    weights: Sequence[int], lengths: Sequence[int], times_us: Sequence[int]
) -> tuple[int, ...]:
    """Return the miners' weights for the next step, from what this step took. In exact arithmetic.

    `lengths` are the segments' bytes and `times_us` the microseconds each took, by miner; a miner
    without bytes or without a time was not measured and keeps its weight. The others share theirs
    in proportion to bytes over time: at once, if the slowest segment took `JUMP_RATIO` times as
    long as all would have taken had they ended together; else a quarter of the way, for times
    scatter, and weights that follow every step would cost more than they gain. Steps of less than
    `MIN_MEASURED_US` change nothing. Weights should be large (`EQUAL_WEIGHT`): they are rounded.
    """
    rates = [
        length * 1_000_000 // time if time > 0 else 0
        for length, time in zip(lengths, times_us, strict=True)
    ]
    measured = [miner for miner, rate in enumerate(rates) if rate > 0]
    slowest = max((times_us[miner] for miner in measured), default=0)
    if len(measured) < 2 or slowest < MIN_MEASURED_US:
        return tuple(weights)
    shared = sum(weights[miner] for miner in measured)
    total_rate = sum(rates)
    together = Fraction(1_000_000 * sum(lengths[miner] for miner in measured), total_rate)
    jump = slowest > JUMP_RATIO * together
    new = list(weights)
    for miner in measured:
        earned = shared * rates[miner] // total_rate
        new[miner] = max(1, earned if jump else (3 * weights[miner] + earned) // 4)
    return tuple(new)


def map_digest(segments: Sequence[Segment]) -> bytes:
    """Return the 16-byte digest of a partition, which stands in each OPEN.

    It is blake2b over the number of segments (uint32) and each one's index (uint32), offset and
    length (uint64), little-endian. The anchor is not in it: it follows from the step's number.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=_DIGEST_PERSON)
    digest.update(_MAP_HEADER.pack(len(segments)))
    for segment in segments:
        digest.update(_MAP_ENTRY.pack(segment.index, segment.offset, segment.length))
    return digest.digest()


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _check_and_scale(
    total_bytes: int, segment_count: int, first: int, weights: Sequence[float] | None
) -> list[int]:
    """Return integers in exactly the proportion of the weights, or raise `ValueError`."""
    if total_bytes < 0:
        raise ValueError(f"total_bytes is {total_bytes}, must be 0 or more")
    if segment_count < 1:
        raise ValueError(f"segment_count is {segment_count}, must be 1 or more")
    if not 0 <= first < segment_count:
        raise ValueError(f"first is {first}, must be in 0..{segment_count - 1}")
    if weights is None:
        return [1] * segment_count
    if len(weights) != segment_count:
        raise ValueError(f"{len(weights)} weights for {segment_count} segments")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and 0 or more: {list(weights)}")
    if not any(weights):
        raise ValueError("all weights are zero: no miner may hold the tensor")
    exact = [Fraction(float(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    return [int(fraction * scale) for fraction in exact]


def _lengths(total_bytes: int, used: Sequence[int], scaled: Sequence[int]) -> dict[int, int]:
    """Split the bytes over `used`, given in the order of the byte ranges; {miner: length}."""
    if len(used) == 1:
        return {used[0]: total_bytes}
    total_blocks = _blocks(total_bytes)
    whole = sum(scaled[miner] for miner in used)
    blocks, remainders = {}, {}
    for miner in used:
        blocks[miner], remainders[miner] = divmod(total_blocks * scaled[miner], whole)
    missing = total_blocks - sum(blocks.values())
    by_remainder = sorted(used, key=lambda miner: (remainders[miner], miner), reverse=True)
    for miner in by_remainder[:missing]:
        blocks[miner] += 1
    lengths = {miner: count * BLOCK_BYTES for miner, count in blocks.items()}
    # The tensor ends inside the last block, which is the last miner's.
    lengths[used[-1]] -= total_blocks * BLOCK_BYTES - total_bytes
    return lengths
