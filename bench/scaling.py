"""How a step's time grows with the tensor, the peers, the miners and the path's delay, and what it
holds in memory: `make bench-scaling`.

All on one machine over loopback, so that time is bound by the processors: with K peers or N miners
more, the same cores carry more. The floor is that of `loopback.py`; with a delay it is one round
trip more, since a result cannot come sooner. No rival runs here.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bench import floor
from bench.lab import LOOPBACK, on_loopback
from bench.ours import Run, measure
from bench.relay import Relay
from bench.report import (
    FLOOR,
    OURS,
    add_output_flags,
    figure,
    milliseconds,
    parse,
    print_settings,
    progress,
    run_program,
    save,
    settings_of_run,
    size,
    write_json,
)
from bench.steps import Case, summary
from bench.subnets import PlacedSubnet, RelayedSubnet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.report import Row

KIB, MIB = 1 << 10, 1 << 20
FLOOR_BYTES = 2 << 30
SIZES = (*(4 * KIB << shift for shift in range(0, 18, 2)), 512 * MIB)
COUNTS = (1, 2, 4, 8, 16)
COUNTS_BYTES = 13_000_000
DELAYS_MS = (5, 10, 20, 40, 100)
DELAY_SIZES = (64 * KIB, 4 * MIB)
MEMORY_SIZES = (64 * MIB, 512 * MIB, 2048 * MIB)
CURVES = ("bytes", "peers", "miners", "delay", "memory")


def steps_for(nbytes: int) -> int:
    """Many of what takes milliseconds, few of what takes seconds."""
    return 50 if nbytes <= MIB else 10 if nbytes <= 64 * MIB else 5


def case_of(peers: int, miners: int, nbytes: int) -> Case:
    return Case(peers=peers, miners=miners, nbytes=nbytes, steps=steps_for(nbytes))


def rows_of(
    curve: str, values: Sequence[float], cases: Sequence[Case], run: Run, floors: Sequence[float]
) -> list[Row]:
    """One row per case of a job; `values` are what the curve goes along."""
    rows = []
    for value, case, seconds, floor_s in zip(values, cases, run.seconds, floors, strict=True):
        took = summary(seconds, case.warm_up)
        rows.append(
            {
                "curve": curve,
                "value": value,
                "peers": case.peers,
                "miners": case.miners,
                "bytes": case.nbytes,
                "floor_s": floor_s,
                "median_s": took.median_s,
                "p95_s": took.p95_s,
                "x_floor": took.median_s / floor_s,
                "peer_peak_bytes": run.peer_peak_bytes,
                "miner_peak_bytes": run.miner_peak_bytes,
            }
        )
        print_row(rows[-1])
    return rows


def print_row(row: Row) -> None:
    value = size(row["value"]) if row["curve"] in ("bytes", "memory") else f"{row['value']:g}"
    name = row["curve"] + (" ms" if row["curve"] == "delay" else "")
    line = f"{name:<10}{value:>9}{row['peers']:>5}{row['miners']:>5}{size(row['bytes']):>10}"
    line += "".join(f"{milliseconds(row[key]):>9}" for key in ("floor_s", "median_s", "p95_s"))
    peaks = "".join(f"{row[key] / MIB:9.1f}" for key in ("peer_peak_bytes", "miner_peak_bytes"))
    print(f"{line}{row['x_floor']:9.2f}{peaks}", flush=True)


class Scaling:
    """Runs the curves, given what a raw stream carries."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s

    def floor_s(self, case: Case) -> float:
        return floor.loopback_floor_s(case.nbytes, case.peers, self._bytes_per_s)

    def _job(
        self,
        curve: str,
        values: Sequence[float],
        cases: Sequence[Case],
        subnet: PlacedSubnet,
        round_trip_s: float = 0.0,
    ) -> list[Row]:
        progress(f"{curve}: K={cases[0].peers}, N={cases[0].miners}")
        run = measure(subnet, [LOOPBACK] * cases[0].peers, cases)
        floors = [self.floor_s(case) + round_trip_s for case in cases]
        return rows_of(curve, values, cases, run, floors)

    def bytes(self) -> list[Row]:
        with PlacedSubnet(on_loopback(4, 4)) as subnet:
            return self._job("bytes", SIZES, [case_of(4, 4, nbytes) for nbytes in SIZES], subnet)

    def peers(self) -> list[Row]:
        rows = []
        with PlacedSubnet(on_loopback(1, 4)) as subnet:
            for count in COUNTS:
                rows += self._job("peers", [count], [case_of(count, 4, COUNTS_BYTES)], subnet)
        return rows

    def miners(self) -> list[Row]:
        rows = []
        for count in COUNTS:
            with PlacedSubnet(on_loopback(4, count)) as subnet:
                rows += self._job("miners", [count], [case_of(4, count, COUNTS_BYTES)], subnet)
                if count == max(COUNTS):  # as many peers: the largest job of all
                    both = [case_of(count, count, COUNTS_BYTES)]
                    rows += self._job("peers", [count], both, subnet)
        return rows

    def delay(self) -> list[Row]:
        rows = []
        cases = [case_of(2, 2, nbytes) for nbytes in DELAY_SIZES]
        for delay_ms in DELAYS_MS:
            relayed = RelayedSubnet(on_loopback(2, 2))
            with Relay(LOOPBACK, relayed.routes, delay_ms / 2000), relayed:
                values = [delay_ms] * len(cases)
                rows += self._job("delay", values, cases, relayed, delay_ms / 1000)
        return rows

    def memory(self) -> list[Row]:
        """One job per size, so that each peak is its own."""
        rows = []
        with PlacedSubnet(on_loopback(2, 2)) as subnet:
            for nbytes in MEMORY_SIZES:
                case = Case(peers=2, miners=2, nbytes=nbytes, steps=1, warm_up=1)
                rows += self._job("memory", [nbytes], [case], subnet)
        return rows


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A panel per curve: time, and its floor; peak memory in the last."""
    curves = [curve for curve in CURVES if any(row["curve"] == curve for row in rows)]
    drawing, panels = figure(1, len(curves), 3.2 * len(curves), 3.4)
    labels = {"bytes": "tensor, bytes", "delay": "round trip, ms", "memory": "tensor, bytes"}
    for curve, axes in zip(curves, [panels] if len(curves) == 1 else panels, strict=True):
        mine = [row for row in rows if row["curve"] == curve]
        if curve in ("peers", "miners"):
            mine = [row for row in mine if row["peers"] == 4 or row["miners"] == 4]
        groups = sorted({row["bytes"] for row in mine}) if curve == "delay" else [None]
        for index, nbytes in enumerate(groups):
            line = [row for row in mine if nbytes is None or row["bytes"] == nbytes]
            values = [row["value"] for row in line]
            style = ("-", "--")[index % 2]
            if curve == "memory":
                for who, color in (("peer", OURS), ("miner", FLOOR)):
                    peaks = [row[f"{who}_peak_bytes"] for row in line]
                    axes.plot(values, peaks, "o-", color=color, label=who, markersize=3)
                continue
            name = f"ours, {size(nbytes)}" if nbytes else "ours"
            medians, floors = ([row[key] for row in line] for key in ("median_s", "floor_s"))
            axes.plot(values, medians, "o" + style, color=OURS, label=name, markersize=3)
            axes.plot(values, floors, style, color=FLOOR, label="floor", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(labels.get(curve, curve), fontsize=8)
        axes.set_ylabel("peak beyond idle, bytes" if curve == "memory" else "seconds", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--curve", nargs="+", choices=CURVES, default=list(CURVES), help="only these"
    )
    add_output_flags(parser)
    options = parse(parser)
    settings = settings_of_run()
    print_settings(settings)
    progress("floor")
    raw = floor.one_way(FLOOR_BYTES, LOOPBACK)
    scaling = Scaling(raw.bytes_per_s)
    print(f"raw socket {raw.bytes_per_s / 1e9:.2f} GB/s; milliseconds of the slowest rank; MiB")
    print(
        f"{'curve':<10}{'value':>9}{'K':>5}{'N':>5}{'tensor':>10}{'floor':>9}{'median':>9}"
        f"{'p95':>9}{'x floor':>9}{'peer':>9}{'miner':>9}"
    )
    rows: list[Row] = []
    for curve in options.curve:
        rows += getattr(scaling, curve)()
        write_json(options.json, settings, rows=rows)
    if options.png is not None:
        draw(options.png, rows)


if __name__ == "__main__":
    run_program(main)
