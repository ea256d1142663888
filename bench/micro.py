"""What the inner loops cost, beside memory bandwidth: `make bench-micro`.

Reduce kernels, frames and hashing, each alone in a process: no sockets, no event loop. Bytes are
input bytes; one run is long enough that nothing of it stays in a cache.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report import (
    FLOOR,
    OURS,
    Row,
    add_output_flags,
    figure,
    parse,
    print_settings,
    progress,
    run_program,
    save,
    settings_of_run,
    write_json,
)
from mapreduce.core.dtypes import DType
from mapreduce.core.reduce import ReduceOp, Reducer
from mapreduce.wire.frames import FrameReader, Header, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MIB = 1 << 20
COPIED = 256 * MIB
REDUCED = 64 * MIB  # of each contributor
HASHED = 64 * MIB
RUN_BYTES = MIB  # reduced in one call, as a miner does when frames come fast
FRAMES = 4000
FRAME_SIZES = (16 << 10, 64 << 10, MIB)
CONTRIBUTORS = (2, 4, 8)
THREADS = (1, 2)
THREADED = 4  # contributors of the kernels that are also run on several threads
KERNELS = (
    (DType.FLOAT32, ReduceOp.SUM),
    (DType.FLOAT32, ReduceOp.AVG),
    (DType.FLOAT64, ReduceOp.SUM),
    (DType.BFLOAT16, ReduceOp.SUM),
    (DType.FLOAT16, ReduceOp.SUM),
    (DType.INT32, ReduceOp.SUM),
)


def rate(nbytes: int, runs: int, works: Sequence[Callable[[], object]]) -> float:
    """Bytes per second, median of `runs`, when the works, which share `nbytes`, go side by side."""
    with ThreadPoolExecutor(len(works)) as pool:
        seconds = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            for future in [pool.submit(work) for work in works]:
                future.result()
            seconds.append(time.perf_counter() - started)
    return nbytes / statistics.median(seconds[1:])  # the first one touched the memory


def copying(threads: int, runs: int) -> float:
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    halves = zip(np.split(source, threads), np.split(target, threads), strict=True)
    works = [lambda a=a, b=b: np.copyto(b, a) for a, b in halves]
    return rate(COPIED, runs, works)


def reducing(dtype: DType, op: ReduceOp, contributors: int, threads: int, runs: int) -> float:
    """The runs of a segment one after the other; each thread has its share and its own Reducer."""
    numbers = np.random.default_rng(0).integers(1, 100, REDUCED // dtype.itemsize)
    inputs = [_encoded(numbers, dtype) for _ in range(contributors)]
    output = np.empty(REDUCED, np.uint8)
    starts = np.split(np.arange(0, REDUCED, RUN_BYTES), threads)

    def share(mine: Any) -> None:
        reducer = Reducer(dtype, op, contributors, RUN_BYTES)
        for start in mine:
            where = slice(start, start + RUN_BYTES)
            reducer.reduce([data[where] for data in inputs], output[where].data)

    works = [lambda mine=mine: share(mine) for mine in starts]
    return rate(contributors * REDUCED, runs, works)


def _encoded(numbers: Any, dtype: DType) -> memoryview:
    """The numbers as a contribution's bytes; bfloat16 is the upper half of float32."""
    if dtype is DType.BFLOAT16:
        upper = numbers.astype(np.float32).view(np.uint32) >> 16
        return memoryview(upper.astype(np.uint16).view(np.uint8))
    return memoryview(numbers.astype(dtype.storage).view(np.uint8))


def framing(frame_bytes: int, runs: int) -> float:
    """Frames per second, encoded by one side and read by the other; the payload stays where it
    is."""
    memory = memoryview(bytearray(frame_bytes))
    reader = FrameReader(lambda header, received: memory[received:], lambda header, body: None)

    def carry() -> None:
        for number in range(FRAMES):
            offset = number * frame_bytes
            head = Header(kind=Kind.DATA, step=1, offset=offset, length=frame_bytes).encode()
            reader.get_buffer()[:] = head
            reader.buffer_updated(len(head))
            reader.buffer_updated(len(reader.get_buffer()))

    return rate(FRAMES, runs, [carry])


def hashing(threads: int, runs: int) -> tuple[str, float]:
    """By BLAKE3 where it is installed, else by the standard library's BLAKE2b."""
    try:
        digest = importlib.import_module("blake3").blake3
    except ImportError:
        digest = hashlib.blake2b
    parts = np.split(np.ones(HASHED, np.uint8), threads)
    works = [lambda part=part: digest(part.data).digest() for part in parts]
    return digest.__name__, rate(HASHED, runs, works)


def measure(runs: int) -> list[Row]:
    """Every figure; `GB_per_s` is absent where bytes are not touched."""
    progress("memory")
    copies = {threads: copying(threads, runs) for threads in THREADS}
    rows: list[Row] = []

    def add(what: str, threads: int, bytes_per_s: float, **others: Any) -> None:
        share = bytes_per_s / copies[threads]
        row = {"what": what, "threads": threads, "GB_per_s": bytes_per_s / 1e9, "x_copy": share}
        rows.append(row | others)
        print(f"{what:<34}{threads:>8}{bytes_per_s / 1e9:10.2f}{share:10.2f}", flush=True)

    for threads, bytes_per_s in copies.items():
        add("copy", threads, bytes_per_s)
    for dtype, op in KERNELS:
        progress(f"{dtype.label} {op.label}")
        for count in CONTRIBUTORS:
            for threads in THREADS if count == THREADED else THREADS[:1]:
                bytes_per_s = reducing(dtype, op, count, threads, runs)
                add(f"{op.label} of {count} {dtype.label}", threads, bytes_per_s)
    progress("frames")
    for frame_bytes in FRAME_SIZES:
        per_s = framing(frame_bytes, runs)
        name = f"frames of {frame_bytes >> 10} KiB, {per_s / 1e3:.0f} k/s"
        add(name, 1, per_s * frame_bytes, frames_per_s=per_s)
    progress("hashing")
    for threads in THREADS:
        name, bytes_per_s = hashing(threads, runs)
        add(name, threads, bytes_per_s)
    return rows


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A bar per kernel and hash; frames, which move no bytes, are left out."""
    shown = [row for row in rows if "frames_per_s" not in row]
    drawing, axes = figure(1, 1, 8, 0.8 + 0.22 * len(shown))
    names = [f"{row['what']}, {row['threads']} thread(s)" for row in shown]
    bars = axes.barh(names, [row["GB_per_s"] for row in shown], color=OURS)
    axes.bar_label(bars, fmt=" %.1f", fontsize=7)
    axes.axvline(shown[0]["GB_per_s"], color=FLOOR, linewidth=0.8)
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of input; the line is memory bandwidth of one thread (copying)")
    save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="of each figure; the median counts")
    add_output_flags(parser)
    options = parse(parser)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: 1 or more")
    settings = settings_of_run()
    print_settings(settings)
    print(f"{'what':<34}{'threads':>8}{'GB/s':>10}{'x copy':>10}")
    rows = measure(options.runs)
    write_json(options.json, settings, rows=rows)
    if options.png is not None:
        draw(options.png, rows)


if __name__ == "__main__":
    run_program(main)
