"""Element types: stable codes, sizes, names and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mapreduce.core.dtypes import DType, dtype_from_label, dtype_from_numpy
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.errors import UnsupportedTensor


def test_wire_codes_are_pinned() -> None:
    assert {dtype.label: int(dtype) for dtype in DType} == {
        "float32": 1,
        "float64": 2,
        "float16": 3,
        "bfloat16": 4,
        "int8": 5,
        "uint8": 6,
        "int16": 7,
        "int32": 8,
        "int64": 9,
        "bool": 10,
        "complex64": 11,
        "complex128": 12,
    }


@pytest.mark.parametrize("dtype", DType)
def test_a_block_holds_whole_elements_and_labels_round_trip(dtype: DType) -> None:
    assert BLOCK_BYTES % dtype.itemsize == 0
    assert dtype_from_label(dtype.label) is dtype
    assert dtype.storage.itemsize == dtype.itemsize
    if dtype is not DType.BFLOAT16:
        assert dtype_from_numpy(np.dtype(dtype.label)) is dtype
        assert dtype_from_numpy(dtype.storage) is dtype


def test_what_can_be_added_and_what_averaged() -> None:
    floats = {DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16}
    integers = {DType.INT8, DType.UINT8, DType.INT16, DType.INT32, DType.INT64}
    assert {dtype for dtype in DType if dtype.is_float} == floats
    assert {dtype for dtype in DType if dtype.reducible} == floats | integers


@pytest.mark.parametrize("name", ["uint16", "object", "datetime64[s]", "longdouble", "U3"])
def test_an_unsupported_dtype_is_named_with_what_is_allowed(name: str) -> None:
    dtype = np.dtype(name)
    with pytest.raises(UnsupportedTensor, match=r"not supported; allowed are float32, .*bool") as e:
        dtype_from_numpy(dtype)
    assert dtype.name in str(e.value)


def test_big_endian_is_refused_with_the_remedy() -> None:
    array = np.arange(3, dtype=">f4")
    with pytest.raises(UnsupportedTensor, match="big-endian"):
        dtype_from_numpy(array.dtype)
    assert dtype_from_numpy(array.astype(array.dtype.newbyteorder("<")).dtype) is DType.FLOAT32
