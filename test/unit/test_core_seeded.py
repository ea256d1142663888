"""Tensors from a seed: the same wherever they are made, and every wrong value is found."""

from __future__ import annotations

import numpy as np
import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp, reduce_reference
from mapreduce.core.seeded import PIECE_BYTES, SeededTensor, first_difference

SEED = bytes(range(32))


def test_any_part_of_a_tensor_is_that_part_of_the_whole() -> None:
    tensor = SeededTensor(SEED, 1, 2)
    whole = tensor.read(0, 4096).tobytes()
    for begin, nbytes in ((0, 4), (4, 64), (60, 72), (2048, 2048)):
        assert tensor.read(begin, nbytes).tobytes() == whole[begin : begin + nbytes]


def test_filling_across_a_piece_is_the_same_as_reading() -> None:
    memory = bytearray(PIECE_BYTES + 12)
    tensor = SeededTensor(SEED, 0, 1)
    tensor.fill(memoryview(memory))
    assert bytes(memory[-24:]) == tensor.read(PIECE_BYTES - 12, 24).tobytes()


def test_seed_rank_and_step_each_make_another_tensor() -> None:
    places = [(SEED, 0, 0), (SEED, 1, 0), (SEED, 0, 1), (bytes(32), 0, 0)]
    assert len({SeededTensor(*place).read(0, 64).tobytes() for place in places}) == 4


def test_the_values_are_normal_numbers_of_both_signs_below_one_half() -> None:
    values = SeededTensor(SEED, 0, 0).read(0, 40_000)
    assert np.all(np.abs(values) >= 2.0**-9)
    assert np.all(np.abs(values) < 0.5)
    assert 0.4 < np.mean(values < 0) < 0.6


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_seed_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 are needed"):
        SeededTensor(bytes(length), 0, 0)


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.AVG])
def test_a_right_result_has_no_difference_and_one_bit_is_one(op: ReduceOp) -> None:
    inputs = [SeededTensor(SEED, rank, 1) for rank in range(3)]
    made = [tensor.read(400, 1000) for tensor in inputs]
    right = bytearray(reduce_reference(made, DType.FLOAT32, op).tobytes())
    assert first_difference(memoryview(right), 400, inputs, op) is None
    for wrong in (0, 500, 996):
        right[wrong] ^= 1
        assert first_difference(memoryview(right), 400, inputs, op) == wrong
        right[wrong] ^= 1


def test_a_difference_after_the_first_piece_is_found_where_it_is() -> None:
    tensor = SeededTensor(SEED, 0, 1)
    result = bytearray(PIECE_BYTES + 64)
    tensor.fill(memoryview(result))
    result[-1] ^= 1
    wrong = first_difference(memoryview(result), 0, [tensor], ReduceOp.SUM)
    assert wrong == PIECE_BYTES + 60
