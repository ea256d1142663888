"""What a miner's processor does with bytes, beside what its memory moves: `make bench-micro`.

Reduce kernels, frame headers and hashes alone, without sockets, on one thread and on two: whether
two threads are faster tells whether the interpreter's lock is dropped meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from bench import floor
from bench.lab import LOOPBACK
from bench.report import (
    COLORS,
    add_output_flags,
    figure,
    parse,
    print_settings,
    progress,
    run_program,
    save,
    settings_of_run,
    size,
    write_json,
)
from mapreduce.core.dtypes import DType
from mapreduce.core.hash_tree import RootHasher
from mapreduce.core.reduce import ReduceOp, Reducer
from mapreduce.wire.frames import FrameReader, Header, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Work = Callable[[], int]  # does a piece of work; returns how many bytes that was

RUNS = 7
RUN_S = 0.1
THREADS = (1, 2)
COPY_BYTES = 256 << 20  # much larger than the caches
WINDOW_BYTES = 4 << 20  # of a contributor; a miner's default
RUN_BYTES = 1 << 20  # what is reduced or hashed at a time
FRAME_BYTES = (16 << 10, 64 << 10, 1 << 20)
CONTRIBUTORS = (2, 4, 8)
DTYPES = (DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16, DType.INT32)
SOCKET_BYTES = 2 << 30
LINE_BYTES_PER_S = 1.25e9  # 10 Gbit/s


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Bytes per second of one kind of work, on one thread and on two together."""

    part: str
    name: str
    one_bytes_per_s: float
    two_bytes_per_s: float


# Measuring ------------------------------------------------------------------------------------


def rate_of(part: str, name: str, make: Callable[[], Work]) -> Rate:
    """Median of RUNS; `make` prepares a thread's own buffers."""
    works = [make() for _ in range(max(THREADS))]
    one, two = (
        statistics.median(bytes_per_s(works[:count]) for _ in range(RUNS)) for count in THREADS
    )
    rate = Rate(part=part, name=name, one_bytes_per_s=one, two_bytes_per_s=two)
    print(f"{name:<32}{one / 1e9:10.2f}{two / 1e9:10.2f}{two / one:8.2f}", flush=True)
    return rate


def bytes_per_s(works: Sequence[Work]) -> float:
    """Of all threads together, for RUN_S seconds."""
    start = threading.Barrier(len(works), timeout=60.0)

    def work(go: Work) -> tuple[int, float]:
        go()  # warm
        start.wait()
        started, done = time.perf_counter(), 0
        while time.perf_counter() < started + RUN_S:
            done += go()
        return done, time.perf_counter() - started

    with ThreadPoolExecutor(len(works)) as pool:
        return sum(done / seconds for done, seconds in pool.map(work, works))


# The kinds of work ----------------------------------------------------------------------------


def copying() -> Work:
    """The memory's bandwidth: bytes copied, each of which is read once and written once."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)
    place = 0

    def work() -> int:
        nonlocal place
        np.copyto(target[place : place + RUN_BYTES], source[place : place + RUN_BYTES])
        place = (place + RUN_BYTES) % COPY_BYTES
        return RUN_BYTES

    return work


def reducing(dtype: DType, contributors: int) -> Work:
    """Contributions read per second; runs that follow each other in a window per contributor."""
    values = np.arange(WINDOW_BYTES // dtype.itemsize) % 251
    if dtype is DType.BFLOAT16:  # the upper half of a float32
        array = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    else:
        array = values.astype(dtype.storage)
    windows = [memoryview(array.tobytes()) for _ in range(contributors)]
    ring = memoryview(bytearray(WINDOW_BYTES))
    reducer = Reducer(dtype, ReduceOp.SUM, contributors, RUN_BYTES)
    place = 0

    def work() -> int:
        nonlocal place
        span = slice(place, place + RUN_BYTES)
        reducer.reduce([window[span] for window in windows], ring[span])
        place = (place + RUN_BYTES) % WINDOW_BYTES
        return RUN_BYTES * contributors

    return work


def framing(nbytes: int) -> Work:
    """One DATA frame made and one taken apart; its payload is not touched."""
    place = memoryview(bytearray(nbytes))
    frames = 0

    def payload_buffer(_: Header, received: int) -> memoryview:
        return place[received:]

    def frame_received(_header: Header, _body: memoryview) -> None:
        nonlocal frames
        frames += 1

    reader = FrameReader(payload_buffer, frame_received)

    def work() -> int:
        reader.feed(Header(kind=Kind.DATA, step=1, offset=0, length=nbytes).encode())
        reader.buffer_updated(len(reader.get_buffer()))
        return nbytes

    return work


def hashing(algorithm: Callable[[memoryview], object]) -> Work:
    """A digest of each run of RUN_BYTES."""
    data = memoryview(bytes(WINDOW_BYTES))
    place = 0

    def work() -> int:
        nonlocal place
        algorithm(data[place : place + RUN_BYTES])
        place = (place + RUN_BYTES) % WINDOW_BYTES
        return RUN_BYTES

    return work


def tree(run: memoryview) -> bytes:
    """What a step really does: BLAKE3 of blocks, and of pairs of digests up to the root."""
    hasher = RootHasher()
    hasher.add(run)
    return hasher.root()


def blake3_digest(run: memoryview) -> bytes:
    return blake3(run).digest()


# The program ----------------------------------------------------------------------------------


def measure_all() -> list[Rate]:
    """Everything, printed as it comes."""
    rates = [rate_of("memory", "copy", copying)]
    for dtype in DTYPES:
        for count in CONTRIBUTORS:
            make = partial(reducing, dtype, count)
            rates.append(rate_of("reduce", f"reduce {dtype.label}, K={count}", make))
    for nbytes in FRAME_BYTES:
        rate = rate_of("frame", f"frames of {size(nbytes)}", partial(framing, nbytes))
        print(f"    {rate.one_bytes_per_s / nbytes / 1e3:.0f} thousand frames a second")
        rates.append(rate)
    rates.append(rate_of("hash", "blake3", partial(hashing, blake3_digest)))
    rates.append(rate_of("hash", "hash tree of 16 KiB blocks", partial(hashing, tree)))
    return rates


def miner_need(rates: Sequence[Rate]) -> dict[str, float]:
    """CPU seconds per GB that a miner receives, reduces and sends at least: raw sockets, the
    float32 kernel and frame headers."""
    progress("raw sockets")
    raw = floor.one_way(SOCKET_BYTES, LOOPBACK)
    one = {rate.name: rate.one_bytes_per_s for rate in rates}
    return {
        "receive": raw.receive_cpu_s_per_GB,
        "reduce": 1e9 / one[f"reduce {DType.FLOAT32.label}, K=4"],
        "send": raw.send_cpu_s_per_GB,
        "frames": 2e9 / one[f"frames of {size(FRAME_BYTES[1])}"],  # in and out
    }


def draw(path: Path, rates: Sequence[Rate]) -> None:
    drawing, axes = figure(1, 1, 8, 6)
    # Frames are not drawn: their payload is not touched, so that their rate dwarfs all others.
    rates = [rate for rate in rates if rate.part != "frame"]
    places = range(len(rates))
    for shift, label, color in ((-0.2, "one", COLORS["gloo"]), (0.2, "two", COLORS["ours"])):
        values = [getattr(rate, f"{label}_bytes_per_s") / 1e9 for rate in rates]
        name = f"{label} thread{'s' if label == 'two' else ''}"
        axes.barh([place + shift for place in places], values, 0.4, color=color, label=name)
    axes.set_yticks(places, [rate.name for rate in rates], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
    axes.legend(fontsize=8)
    save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_output_flags(parser)
    options = parse(parser)
    settings = settings_of_run(run_bytes=RUN_BYTES, window_bytes=WINDOW_BYTES)
    print_settings(settings)
    print(
        f"GB/s, median of {RUNS}. copy: bytes copied; reduce: contributions read; frames: payload,"
    )
    print("which is not touched; hashes: bytes read")
    print(f"{'':<32}{'1 thread':>10}{'2 threads':>10}{'ratio':>8}")
    rates = measure_all()
    need = miner_need(rates)
    total = sum(need.values())
    parts = " + ".join(f"{part} {seconds:.3f}" for part, seconds in need.items())
    print(f"a miner of float32, K=4, needs at least {parts} = {total:.2f} CPU s per GB")
    print(f"at 10 Gbit/s each way: {total * LINE_BYTES_PER_S / 1e9:.2f} cores")
    results = [asdict(rate) for rate in rates]
    write_json(options.json, settings, rates=results, miner_cpu_s_per_GB=need)
    if options.png is not None:
        draw(options.png, rates)


if __name__ == "__main__":
    run_program(main)
