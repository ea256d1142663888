"""What verification costs: the same collectives with and without it, in turns, in one run.

`sudo make bench-trust` runs both cases; the shaped one needs root. Without it nothing is hashed,
signed, checked or sampled; the frames are the same. A hashed byte is one that a peer sends or
receives, or that a miner receives or reduces.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import floor
from bench.lab import LOOPBACK, Lab, enter_laboratory, on_loopback
from bench.ours import measure
from bench.report import (
    add_output_flags,
    milliseconds,
    parse,
    print_settings,
    progress,
    run_program,
    settings_of_run,
    size,
    write_json,
)
from bench.steps import Case, summary
from bench.subnets import PlacedSubnet

if TYPE_CHECKING:
    from bench.lab import Site
    from bench.report import Row

RATE = 400.0  # Mbit/s
FLOOR_BYTES = 2 << 30
_HEAD = (
    f"{'case':<38}{'floor':>8}{'off':>8}{'on':>8}{'on/off':>8}{'x floor':>9}{'peer':>8}{'miner':>8}"
)
CASES = {
    "shaped-4": Case(peers=4, miners=4, nbytes=26_000_000),
    "loopback-2": Case(peers=2, miners=2, nbytes=105_000_000),
    "loopback-4": Case(peers=4, miners=4, nbytes=105_000_000),
    "small-4": Case(peers=4, miners=4, nbytes=64 * 1024, steps=200),
}


@dataclass(frozen=True, slots=True)
class _Side:
    """Medians over the runs with verification, or over those without."""

    median_s: float
    peer_cpu_s_per_GB: float
    miner_cpu_s_per_GB: float


def _side(case: Case, site: Site, verified: bool) -> _Side:
    with PlacedSubnet(site, verified=verified) as subnet:
        run = measure(subnet, site.peers, [case])
    return _Side(
        summary(run.seconds[0], case.warm_up).median_s,
        run.peer_cpu_s_per_GB,
        run.miner_cpu_s_per_GB,
    )


def _median(sides: list[_Side]) -> _Side:
    return _Side(
        statistics.median(side.median_s for side in sides),
        statistics.median(side.peer_cpu_s_per_GB for side in sides),
        statistics.median(side.miner_cpu_s_per_GB for side in sides),
    )


def run(name: str, case: Case, site: Site, floor_s: float, runs: int) -> Row:
    """Both sides in turns, `runs` times each."""
    on, off = [], []
    for number in range(runs):
        progress(f"{name}: run {number + 1} of {runs}")
        off.append(_side(case, site, verified=False))
        on.append(_side(case, site, verified=True))
    with_it, without = _median(on), _median(off)
    # A peer hashes a tensor twice, the miners K inputs and one output of it.
    peer = (with_it.peer_cpu_s_per_GB - without.peer_cpu_s_per_GB) / 2
    miner = (
        (with_it.miner_cpu_s_per_GB - without.miner_cpu_s_per_GB) * case.peers / (case.peers + 1)
    )
    return {
        "case": f"{name}: K={case.peers}, N={case.miners}, {size(case.nbytes)}",
        "floor_s": floor_s,
        "on_s": with_it.median_s,
        "off_s": without.median_s,
        "ratios": [a.median_s / b.median_s for a, b in zip(on, off, strict=True)],
        "on_over_off": with_it.median_s / without.median_s,
        "x_floor": with_it.median_s / floor_s,
        "cpu_s_per_hashed_GB": {"peer": peer, "miner": miner},
        "cpu_s_per_GB": {"on": dataclasses.asdict(with_it), "off": dataclasses.asdict(without)},
    }


def print_row(row: Row) -> None:
    cpu = row["cpu_s_per_hashed_GB"]
    print(
        f"{row['case']:<38}{milliseconds(row['floor_s']):>8}{milliseconds(row['off_s']):>8}"
        f"{milliseconds(row['on_s']):>8}{row['on_over_off']:>8.3f}{row['x_floor']:>9.3f}"
        f"{cpu['peer']:>8.2f}{cpu['miner']:>8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=3, help="of each side (default %(default)s)")
    add_output_flags(parser)
    options = parse(parser)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: 1 or more")
    names = options.case or list(CASES)
    lab = None
    if "shaped-4" in names:
        if os.geteuid() != 0 and options.case is None:
            print("not root: the shaped case is left out", file=sys.stderr)
            names.remove("shaped-4")
        else:
            enter_laboratory()
            lab = Lab()
    settings = settings_of_run(runs=options.runs)
    print_settings(settings)
    print("milliseconds, medians; CPU seconds per hashed GB, of peers and miners")
    print(_HEAD, flush=True)
    rows = []
    for name in names:
        case = CASES[name]
        progress(f"{name}: floor")
        if name == "shaped-4":
            assert lab is not None
            site = lab.build((RATE,) * case.peers, (RATE,) * case.miners)
            raw = floor.both_ways(case.nbytes, *site.peers[:2])
            floor_s = floor.links_floor_s(case.nbytes, [raw] * case.peers, [raw] * case.miners)
        else:
            site = on_loopback(case.peers, case.miners)
            raw = floor.one_way(FLOOR_BYTES, LOOPBACK).bytes_per_s
            floor_s = floor.loopback_floor_s(case.nbytes, case.peers, raw)
        rows.append(run(name, case, site, floor_s, options.runs))
        print_row(rows[-1])
        write_json(options.json, settings, rows=rows)
        if name == "shaped-4":
            assert lab is not None
            lab.clear()


if __name__ == "__main__":
    run_program(main)
