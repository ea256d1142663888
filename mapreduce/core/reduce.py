"""Exact reduction in rank order. Knows dtypes, operations and byte runs; knows no network or job.

The normative rule, per element, where X[k] is the contribution of the k-th rank present:

    acc = X[0];  for k in 1 .. K-1: acc = round(acc + X[k]);  AVG: acc = round(acc / K)

- float32 and float64 accumulate in themselves. float16 and bfloat16 are widened to float32, and the
  result, after the division, is rounded once to nearest even. Integers wrap; they have no AVG.
- Every NaN of the result is the canonical quiet one: payloads differ between CPUs. -0.0 is kept.
- Forbidden, since they change bits: fused multiply-add, multiplying by 1/K, pairwise sums, wider
  accumulators, flushing subnormals to zero.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mapreduce.core.dtypes import DType
from mapreduce.errors import LocalError, UnsupportedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# Any: the element type is decided by a DType at run time.
Array: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = memoryview | bytes | bytearray | Array

# A tile of the accumulator stays in L2 while the ranks are added to it one after the other.
# Measured on 1 MiB frames: below 64 KiB the calls cost more than the additions; 256 KiB to 1 MiB
# are alike, and larger tiles leave the caches of smaller CPUs.
TILE_BYTES = 256 * 1024

# The canonical quiet NaN in the type that accumulates; both round to 0x7e00 and 0x7fc0.
_NAN_BITS: dict[int, Any] = {4: np.uint32(0x7FC00000), 8: np.uint64(0x7FF8000000000000)}
_BITS_DTYPE: dict[int, np.dtype[Any]] = {4: np.dtype("<u4"), 8: np.dtype("<u8")}
_FLOAT32 = DType.FLOAT32.storage
_BYTE = DType.UINT8.storage

# The float32 value of every float16, by its bits: 256 KiB. Measured: looking a value up is twice as
# fast as numpy's conversion, which is done in software.
_FLOAT16_VALUES: Array = np.arange(1 << 16, dtype="<u2").view("<f2").astype(_FLOAT32)


class ReduceOp(enum.IntEnum):
    """What a collective does with the contributions; the value is the code on the wire."""

    SUM = 1
    AVG = 2
    BROADCAST = 3

    @property
    def label(self) -> str:
        """Name in the API: "sum", "avg" or "broadcast"."""
        return self.name.lower()


def reduce_op(name: str) -> ReduceOp:
    """Return the operation called `name`; raise `ValueError` with the allowed names if none is."""
    for op in ReduceOp:
        if op.label == name:
            return op
    raise ValueError(f"op is {name!r}, must be one of {', '.join(op.label for op in ReduceOp)}")


def check_reducible(op: ReduceOp, dtype: DType) -> None:
    """Raise `UnsupportedTensor` (a `TypeError`) if `op` has no meaning for `dtype`."""
    if op is ReduceOp.BROADCAST:
        return
    if not dtype.reducible:
        raise UnsupportedTensor(
            f"{dtype.label} tensors can be broadcast but not added; convert the tensor, "
            'for instance to uint8 or float32, and use op="sum"'
        )
    if op is ReduceOp.AVG and not dtype.is_float:
        raise UnsupportedTensor(
            f'the mean of {dtype.label} tensors is not an integer; use op="sum" and divide, '
            "or convert the tensor to float32"
        )


class Reducer:
    """Reduces runs of raw bytes from a fixed number of contributors.

    It owns scratch of at most two tiles and allocates nothing that grows with a run, so one belongs
    to one thread at a time. The result does not depend on how a tensor is cut into runs.
    """

    def __init__(self, dtype: DType, op: ReduceOp, contributors: int, max_bytes: int) -> None:
        """Prepare for runs of at most `max_bytes` bytes of `dtype` from `contributors` ranks.

        Raises `UnsupportedTensor` if `op` has no meaning for `dtype`; `ValueError` if there is no
        contributor, more than one to broadcast, or `max_bytes` is negative.
        """
        check_reducible(op, dtype)
        if contributors < 1:
            raise ValueError(f"contributors is {contributors}, must be 1 or more")
        if op is ReduceOp.BROADCAST and contributors != 1:
            raise ValueError(f"a broadcast has exactly 1 contributor, not {contributors}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, must be 0 or more")
        self._dtype = dtype
        self._op = op
        self._contributors = contributors
        self._max_bytes = max_bytes
        self._widened = op is not ReduceOp.BROADCAST and dtype in (DType.FLOAT16, DType.BFLOAT16)
        work_itemsize = _FLOAT32.itemsize if self._widened else dtype.itemsize
        self._tile = TILE_BYTES // work_itemsize
        scratch = min(self._tile, max_bytes // dtype.itemsize) if self._widened else 0
        self._acc: Array = np.empty(scratch, _FLOAT32)
        self._addend: Array = np.empty(scratch, _FLOAT32)

    def reduce(self, inputs: Sequence[Bytes], out: memoryview | bytearray | Array) -> None:
        """Reduce equally long byte runs, given in rank order, into `out` of the same length.

        Runs are contiguous buffers of whole elements, at any alignment. `out` must be writable and
        must not overlap an input. Raises `ValueError` if the number of inputs, a length or
        writability is wrong; then `out` is untouched.
        """
        length = self._check(inputs, out)
        if length == 0:
            return
        # A broadcast is of bytes: a bool or NaN must not be touched by a conversion.
        storage = _BYTE if self._op is ReduceOp.BROADCAST else self._dtype.storage
        arrays = [np.frombuffer(run, storage) for run in inputs]
        target = np.frombuffer(out, storage)
        if not target.flags.writeable:
            raise ValueError("the output buffer is read-only")
        with np.errstate(all="ignore"):  # inf, NaN and subnormals are results, not accidents
            for start in range(0, target.size, self._tile):
                stop = start + self._tile
                tiles = [array[start:stop] for array in arrays]
                if self._op is ReduceOp.BROADCAST:
                    target[start:stop] = tiles[0]
                elif self._widened:
                    self._reduce_widened(tiles, target[start:stop])
                else:
                    self._accumulate(tiles, target[start:stop])

    def _check(self, inputs: Sequence[Bytes], out: Bytes) -> int:
        """Return the common length of the runs in bytes, or raise `ValueError`."""
        if len(inputs) != self._contributors:
            raise ValueError(f"{len(inputs)} inputs for {self._contributors} contributors")
        length = _size(out)
        for number, run in enumerate(inputs):
            if _size(run) != length:
                raise ValueError(f"input {number} has {_size(run)} bytes, the output {length}")
        if length > self._max_bytes:
            raise ValueError(f"a run of {length} bytes exceeds max_bytes={self._max_bytes}")
        if length % self._dtype.itemsize:
            raise ValueError(f"{length} bytes are not whole {self._dtype.label} elements")
        return length

    def _accumulate(self, tiles: Sequence[Array], acc: Array) -> None:
        """Add the tiles, which have the accumulator's own type, and finish floats."""
        if len(tiles) == 1:
            acc[...] = tiles[0]
        else:
            np.add(tiles[0], tiles[1], out=acc)
            for tile in tiles[2:]:
                np.add(acc, tile, out=acc)
        if self._dtype.is_float:
            self._finish(acc)

    def _reduce_widened(self, tiles: Sequence[Array], target: Array) -> None:
        """Add 16-bit floats in float32 and round the result once."""
        acc, addend = self._acc[: target.size], self._addend[: target.size]
        self._widen(tiles[0], acc)
        for tile in tiles[1:]:
            self._widen(tile, addend)
            np.add(acc, addend, out=acc)
        self._finish(acc)
        if self._dtype is DType.FLOAT16:
            target[...] = acc  # numpy rounds to nearest even, overflow to inf
        else:
            _round_to_bfloat16(acc, addend, target)

    def _widen(self, tile: Array, wide: Array) -> None:
        """Write 16-bit floats as float32, which is exact."""
        if self._dtype is DType.FLOAT16:
            # "wrap" skips the check of indices, which a uint16 cannot fail, and its copy.
            np.take(_FLOAT16_VALUES, tile.view(np.uint16), out=wide, mode="wrap")
        else:  # bfloat16 is the upper half of float32
            bits = wide.view(np.uint32)
            bits[...] = tile
            np.left_shift(bits, np.uint32(16), out=bits)

    def _finish(self, acc: Array) -> None:
        """Divide for AVG and make every NaN canonical."""
        if self._op is ReduceOp.AVG:
            np.divide(acc, acc.dtype.type(self._contributors), out=acc)
        # maximum propagates NaN: one read of a cached tile tells that there is none, as a rule.
        largest = np.maximum.reduce(acc)
        if largest != largest:
            itemsize = acc.dtype.itemsize
            acc.view(_BITS_DTYPE[itemsize])[np.isnan(acc)] = _NAN_BITS[itemsize]


def reduce_reference(arrays: Sequence[Array], dtype: DType, op: ReduceOp) -> Array:
    """Reduce whole tensors by the rule of this module, in the plainest way; for tests and audits.

    `arrays` are K equally shaped arrays of `dtype.storage` in rank order (bfloat16 as its uint16
    bits); returns a new array of that shape and dtype. It shares no code with `Reducer`. Raises
    `UnsupportedTensor` like `check_reducible`, `ValueError` for no array, or several to broadcast.
    """
    check_reducible(op, dtype)
    if not arrays or (op is ReduceOp.BROADCAST and len(arrays) != 1):
        raise ValueError(f"{len(arrays)} arrays cannot be reduced with {op.label}")
    if op is ReduceOp.BROADCAST:
        return arrays[0].copy()
    if dtype is DType.BFLOAT16:
        wide = [(array.astype(np.uint32) * 65536).view(np.float32) for array in arrays]
    elif dtype is DType.FLOAT16:
        wide = [array.astype(np.float32) for array in arrays]
    else:
        wide = list(arrays)
    with np.errstate(all="ignore"):
        total = wide[0]
        for array in wide[1:]:
            total = total + array
        if op is ReduceOp.AVG:
            total = total / total.dtype.type(len(arrays))
        if not dtype.is_float:
            return total
        if dtype is DType.BFLOAT16:
            bits = total.view(np.uint32)
            upper, lower = bits // 65536, bits % 65536
            up = (lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))
            return np.where(np.isnan(total), 0x7FC0, upper + up).astype(np.uint16)
        quiet = {2: 0x7E00, 4: 0x7FC00000, 8: 0x7FF8000000000000}[dtype.itemsize]
        bits_dtype = np.dtype(f"<u{dtype.itemsize}")
        bits = total.astype(dtype.storage).view(bits_dtype)
        return np.where(np.isnan(total), bits_dtype.type(quiet), bits).view(dtype.storage)


def check_subnormals() -> None:
    """Raise `LocalError` if this thread flushes subnormal numbers to zero.

    The flag belongs to the CPU state of a thread (MXCSR on x86, FPCR on ARM), and threads that it
    starts inherit it; libraries built with -ffast-math set it on loading. Every thread that reduces
    calls this once.
    """
    for dtype, least_normal in ((DType.FLOAT32, 1 << 23), (DType.FLOAT64, 1 << 52)):
        bits = _BITS_DTYPE[dtype.itemsize]
        # Compared as integers: a CPU that reads subnormals as zero also finds them equal to zero.
        subnormal = np.ones(1, bits)
        normal = np.full(1, least_normal, bits)
        with np.errstate(all="ignore"):
            doubled = subnormal.view(dtype.storage) + subnormal.view(dtype.storage)
            halved = normal.view(dtype.storage) / dtype.storage.type(2)
        if doubled.view(bits)[0] != 2 or halved.view(bits)[0] != least_normal // 2:
            raise LocalError(
                f"this thread flushes subnormal {dtype.label} numbers to zero, so its sums would "
                "differ from those of other machines. A library built with -ffast-math, or "
                "torch.set_flush_denormal(True), switched this on; remove it, or do not load it "
                "in this process"
            )


def _size(buffer: Bytes) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview | np.ndarray) else len(buffer)


def _round_to_bfloat16(acc: Array, scratch: Array, target: Array) -> None:
    """Round float32 `acc`, its NaNs canonical, to nearest even; overwrites acc and scratch."""
    bits, bias = acc.view(np.uint32), scratch.view(np.uint32)
    # Adding 0x7fff carries into the upper half above a tie, and one more does so at an odd tie.
    # No overflow: the largest patterns are the infinities and the canonical NaN, far from a carry.
    np.right_shift(bits, np.uint32(16), out=bias)
    np.bitwise_and(bias, np.uint32(1), out=bias)
    np.add(bias, np.uint32(0x7FFF), out=bias)
    np.add(bits, bias, out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.copyto(target, bits, casting="same_kind")
