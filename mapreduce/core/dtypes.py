"""Element types of tensors: wire code, size, storage. Knows numpy's names; knows no framework."""

from __future__ import annotations

import enum
from typing import Any, TypeAlias

import numpy as np

from mapreduce.errors import UnsupportedTensor

# Any: which element type an array has is decided by a DType at run time.
NumpyDType: TypeAlias = np.dtype[Any]


class DType(enum.IntEnum):
    """Element type of a tensor; the value is the code on the wire, stable and never reused.

    Elements travel as their raw little-endian bytes. All can be broadcast; `reducible` ones can be
    summed too.
    """

    FLOAT32 = 1
    FLOAT64 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    INT8 = 5
    UINT8 = 6
    INT16 = 7
    INT32 = 8
    INT64 = 9
    BOOL = 10
    COMPLEX64 = 11
    COMPLEX128 = 12

    @property
    def label(self) -> str:
        """Name as numpy and torch print it, such as "float32" or "bfloat16"."""
        return self.name.lower()

    @property
    def storage(self) -> NumpyDType:
        """Little-endian numpy dtype of the raw elements; uint16 for bfloat16, which numpy lacks."""
        return _STORAGE[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.storage.itemsize

    @property
    def is_float(self) -> bool:
        """True for real floating-point types, the only ones that can be averaged."""
        return self in _FLOATS

    @property
    def reducible(self) -> bool:
        """True for types with an addition kernel: every one but bool and the complex ones."""
        return self not in _BROADCAST_ONLY


_STORAGE: dict[DType, NumpyDType] = {
    DType.FLOAT32: np.dtype("<f4"),
    DType.FLOAT64: np.dtype("<f8"),
    DType.FLOAT16: np.dtype("<f2"),
    DType.BFLOAT16: np.dtype("<u2"),
    DType.INT8: np.dtype("i1"),
    DType.UINT8: np.dtype("u1"),
    DType.INT16: np.dtype("<i2"),
    DType.INT32: np.dtype("<i4"),
    DType.INT64: np.dtype("<i8"),
    DType.BOOL: np.dtype("?"),
    DType.COMPLEX64: np.dtype("<c8"),
    DType.COMPLEX128: np.dtype("<c16"),
}
_FLOATS = frozenset({DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16})
_BROADCAST_ONLY = frozenset({DType.BOOL, DType.COMPLEX64, DType.COMPLEX128})
_BY_LABEL: dict[str, DType] = {dtype.label: dtype for dtype in DType}


def dtype_from_label(label: str) -> DType:
    """Return the DType called `label`; raise `UnsupportedTensor` naming what is allowed."""
    try:
        return _BY_LABEL[label]
    except KeyError:
        raise UnsupportedTensor(
            f"dtype {label} is not supported; allowed are {', '.join(_BY_LABEL)}"
        ) from None


def dtype_from_numpy(dtype: NumpyDType) -> DType:
    """Return the DType of a little-endian numpy dtype, `ml_dtypes.bfloat16` included.

    Raises `UnsupportedTensor` naming the dtype and what is allowed. A plain uint16 array is refused
    rather than taken for bfloat16.
    """
    if dtype.newbyteorder("<") != dtype:
        raise UnsupportedTensor(
            f"dtype {dtype.str} is big-endian; convert the array with "
            f'array.astype(array.dtype.newbyteorder("<"))'
        )
    return dtype_from_label(dtype.name)
