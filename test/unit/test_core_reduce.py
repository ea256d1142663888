"""The reduce rule, bit by bit: golden bytes, an exact oracle, torch, and any cut of the run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapreduce.core import reduce as reduce_module
from mapreduce.core.dtypes import DType, dtype_from_label
from mapreduce.core.reduce import (
    ReduceOp,
    Reducer,
    check_reducible,
    check_subnormals,
    reduce_op,
    reduce_reference,
)
from mapreduce.errors import LocalError, UnsupportedTensor
from test.unit.test_core_exact import (
    FORMATS,
    GOLDEN,
    INTEGERS,
    ITEMSIZE,
    absorbed,
    exact_reduce,
    operations,
    pack,
    specials,
    stream,
)

LABELS = list(ITEMSIZE)


def reduced(label: str, op: str, runs: list[bytes]) -> bytes:
    """Reduce with `Reducer`, check that the reference agrees, return the bytes."""
    dtype, operation = dtype_from_label(label), reduce_op(op)
    out = bytearray(b"\xa5" * len(runs[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reducer(dtype, operation, len(runs), len(out)).reduce(runs, out)
        arrays = [np.frombuffer(run, dtype.storage) for run in runs]
        assert reduce_reference(arrays, dtype, operation).tobytes() == bytes(out)
    return bytes(out)


def check_golden() -> int:
    """Compare with every pinned result; returns how many there are."""
    golden = json.loads(GOLDEN.read_text())
    checked = 0
    for case in golden["vectors"]:
        runs = [bytes.fromhex(run) for run in case["inputs"]]
        for op, expected in case["outputs"].items():
            assert reduced(case["dtype"], op, runs).hex() == expected, (case["dtype"], case["why"])
            checked += 1
    for case in golden["streams"]:
        runs = [
            stream(case["dtype"], rank, case["elements"], case["banded"])
            for rank in range(case["contributors"])
        ]
        for op, expected in case["sha256"].items():
            digest = hashlib.sha256(reduced(case["dtype"], op, runs)).hexdigest()
            assert digest == expected, (case["dtype"], op, case["contributors"])
            checked += 1
    return checked


def test_golden_bytes() -> None:
    assert check_golden() == 101


def test_golden_bytes_without_simd() -> None:
    """The CPU's vector width must not matter: numpy is told to use its baseline kernels only."""
    features = [name for name, on in cpu_features().items() if on]
    code = "from test.unit.test_core_reduce import check_golden; check_golden()"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    root = GOLDEN.parents[2]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env=environment, cwd=root
    )


def cpu_features() -> dict[str, bool]:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return {name: __cpu_features__[name] for name in __cpu_dispatch__}


@st.composite
def contributions(draw: st.DrawFn) -> tuple[str, str, list[list[int]]]:
    label = draw(st.sampled_from(LABELS))
    op = draw(st.sampled_from(operations(label)))
    bits = st.sampled_from(specials(label)) | st.integers(0, (1 << 8 * ITEMSIZE[label]) - 1)
    ranks, elements = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    column = st.lists(bits, min_size=elements, max_size=elements)
    return label, op, draw(st.lists(column, min_size=ranks, max_size=ranks))


@given(contributions())
@settings(max_examples=120, deadline=None)
def test_every_bit_is_the_exact_oracles(case: tuple[str, str, list[list[int]]]) -> None:
    label, op, columns = case
    expected = pack(label, exact_reduce(label, op, columns))
    assert reduced(label, op, [pack(label, column) for column in columns]) == expected


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("alignment", [0, 1])
def test_cuts_and_alignment_of_the_run_do_not_matter(label: str, alignment: int) -> None:
    op = operations(label)[-1]
    size = ITEMSIZE[label]
    runs = [stream(label, rank, 3000, banded=False) for rank in range(3)]
    whole = reduced(label, op, runs)
    padded = [memoryview(bytes(alignment) + run)[alignment:] for run in runs]
    out = memoryview(bytearray(len(whole) + alignment))[alignment:]
    cuts = np.random.default_rng(5).choice(3000, 12, replace=False) * size
    edges = [0, *sorted(int(cut) for cut in cuts), len(whole)]
    reducer = Reducer(dtype_from_label(label), reduce_op(op), 3, len(whole))
    for start, stop in itertools.pairwise(edges):
        reducer.reduce([run[start:stop] for run in padded], out[start:stop])
    assert bytes(out) == whole


@pytest.mark.parametrize("label", LABELS)
def test_runs_longer_than_a_tile(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [stream(label, rank, 1000, banded=False) for rank in range(3)]
    op = operations(label)[-1]
    whole = reduced(label, op, runs)
    monkeypatch.setattr(reduce_module, "TILE_BYTES", 328)  # 1000 elements end inside a tile
    assert reduced(label, op, runs) == whole


@pytest.mark.parametrize("label", FORMATS)
def test_rank_order_matters_for_floats(label: str) -> None:
    big, small, minus_big = (pack(label, [bits]) for bits in absorbed(label))
    assert reduced(label, "sum", [big, small, minus_big]) == bytes(len(big))
    assert reduced(label, "sum", [big, minus_big, small]) == small


@pytest.mark.parametrize("label", INTEGERS)
def test_integers_wrap_in_any_order(label: str) -> None:
    runs = [stream(label, rank, 64, banded=False) for rank in range(4)]
    results = {reduced(label, "sum", list(order)) for order in itertools.permutations(runs)}
    assert len(results) == 1


@pytest.mark.parametrize("label", FORMATS)
def test_a_single_nan_is_found_at_any_place_and_made_canonical(label: str) -> None:
    fmt = FORMATS[label]
    ones = np.frombuffer(pack(label, [fmt.encode(1, False)] * 67), f"<u{fmt.itemsize}")
    for place, bits in itertools.product(
        range(67), (fmt.inf | 1, fmt.nan | 3, fmt.sign | fmt.inf | 1, fmt.sign | fmt.nan)
    ):
        array = ones.copy()
        array[place] = bits
        out = np.empty_like(array)
        Reducer(dtype_from_label(label), ReduceOp.SUM, 1, 1024).reduce([array], out)
        array[place] = fmt.nan
        assert out.tobytes() == array.tobytes()


def test_broadcast_copies_every_byte() -> None:
    data = bytes(range(256)) * 4  # bools that are neither 0 nor 1, NaNs with payloads
    for dtype in DType:
        out = bytearray(len(data))
        reducer = Reducer(dtype, ReduceOp.BROADCAST, 1, len(data))
        reducer.reduce([memoryview(data)], memoryview(out))
        assert out == data
        array = np.frombuffer(data, dtype.storage)
        assert reduce_reference([array], dtype, ReduceOp.BROADCAST).tobytes() == data


@pytest.mark.parametrize("label", ["bfloat16", "float16"])
def test_torch_agrees_on_16_bit_floats(label: str) -> None:
    torch = pytest.importorskip("torch")
    fmt = FORMATS[label]
    for banded, divisor in itertools.product((False, True), (1, 3)):
        runs = [stream(label, rank, 20_000, banded) for rank in range(3)]
        tensors = [
            torch.frombuffer(bytearray(run), dtype=torch.int16).view(getattr(torch, label)).float()
            for run in runs
        ]
        total = ((tensors[0] + tensors[1]) + tensors[2]) / divisor
        expected = total.to(getattr(torch, label)).view(torch.int16).numpy().view(np.uint16).copy()
        expected[total.isnan().numpy()] = fmt.nan
        assert reduced(label, "sum" if divisor == 1 else "avg", runs) == expected.tobytes()


def test_scratch_is_bounded() -> None:
    """Nothing that grows with the run is allocated: a run of 64 tiles takes what one tile takes."""
    import tracemalloc

    elements = 64 * reduce_module.TILE_BYTES // 4
    inputs = [np.zeros(elements, np.uint16)] * 2
    out = np.empty(elements, np.uint16)
    for dtype in (DType.BFLOAT16, DType.FLOAT16):
        reducer = Reducer(dtype, ReduceOp.AVG, 2, out.nbytes)
        tracemalloc.start()
        reducer.reduce(inputs, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * reduce_module.TILE_BYTES


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        ([bytes(8)], bytearray(8), "1 inputs for 2 contributors"),
        ([bytes(8), bytes(4)], bytearray(8), "input 1 has 4 bytes, the output 8"),
        ([bytes(6), bytes(6)], bytearray(6), "6 bytes are not whole float32 elements"),
        ([bytes(68), bytes(68)], bytearray(68), "68 bytes exceeds max_bytes=64"),
        ([bytes(8), bytes(8)], memoryview(bytes(8)), "read-only"),
    ],
)
def test_unfit_buffers_are_refused(inputs: list[bytes], out: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reducer(DType.FLOAT32, ReduceOp.SUM, 2, 64).reduce(inputs, out)


@pytest.mark.parametrize(
    ("op", "contributors", "max_bytes", "message"),
    [
        (ReduceOp.SUM, 0, 64, "contributors is 0"),
        (ReduceOp.BROADCAST, 2, 64, "exactly 1 contributor, not 2"),
        (ReduceOp.SUM, 2, -1, "max_bytes is -1"),
    ],
)
def test_unfit_plans_are_refused(
    op: ReduceOp, contributors: int, max_bytes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Reducer(DType.FLOAT32, op, contributors, max_bytes)
    if contributors != 2 or op is ReduceOp.BROADCAST:
        with pytest.raises(ValueError, match="cannot be reduced"):
            reduce_reference([np.zeros(1, "<f4")] * contributors, DType.FLOAT32, op)


def test_operations_have_pinned_codes_and_names() -> None:
    assert {op.label: int(op) for op in ReduceOp} == {"sum": 1, "avg": 2, "broadcast": 3}
    assert [reduce_op(op.label) for op in ReduceOp] == list(ReduceOp)
    with pytest.raises(ValueError, match="op is 'mean', must be one of sum, avg, broadcast"):
        reduce_op("mean")


@pytest.mark.parametrize("dtype", DType)
def test_a_meaningless_operation_is_a_type_error_with_the_remedy(dtype: DType) -> None:
    check_reducible(ReduceOp.BROADCAST, dtype)
    if dtype.is_float:
        check_reducible(ReduceOp.AVG, dtype)
    else:
        with pytest.raises(TypeError, match=f'{dtype.label}.*op="sum"'):
            check_reducible(ReduceOp.AVG, dtype)
        with pytest.raises(UnsupportedTensor):
            Reducer(dtype, ReduceOp.AVG, 2, 64)
    if not dtype.reducible:
        with pytest.raises(UnsupportedTensor, match="broadcast but not added"):
            check_reducible(ReduceOp.SUM, dtype)


def test_the_self_test_passes_here() -> None:
    check_subnormals()


def test_the_self_test_fails_when_the_cpu_flushes_subnormals() -> None:
    torch = pytest.importorskip("torch")
    outcome: list[LocalError | None] = []

    def flush_and_check() -> None:
        assert torch.set_flush_denormal(True)  # sets FTZ and DAZ for this thread only
        try:
            check_subnormals()
            outcome.append(None)
        except LocalError as error:
            outcome.append(error)

    thread = threading.Thread(target=flush_and_check)
    thread.start()
    thread.join()
    assert len(outcome) == 1
    assert "flushes subnormal float32 numbers to zero" in str(outcome[0])
    check_subnormals()  # this thread is as it was
