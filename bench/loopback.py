"""Collectives over loopback beside the floor and the rivals, in one run: `make bench`.

Here the processors are the link. The floor is what the machine moves over loopback sockets at all:
an all-reduce of D bytes by K peers carries 2 K D bytes through miners, at the rate of a raw socket
between two processes. gloo reduces among the peers themselves, without miners.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from bench import floor
from bench.contest import (
    add_contest_flags,
    choose,
    contest,
    draw_ratios,
    print_head,
    print_row,
)
from bench.lab import LOOPBACK, on_loopback
from bench.report import progress, run_program, settings_of_run, size, write_json
from bench.steps import Case
from bench.subnets import PlacedSubnet

if TYPE_CHECKING:
    from bench.report import Row

FLOOR_BYTES = 2 << 30
NBYTES = 105_000_000
CASES = {
    "all-reduce-2": Case(peers=2, miners=2, nbytes=NBYTES),
    "all-reduce-4": Case(peers=4, miners=4, nbytes=NBYTES),
    "small-4": Case(
        peers=4, miners=4, nbytes=64 * 1024, steps=200, rivals=("gloo", "original")
    ),
}  # fmt: skip
OWN_FLAGS = ("peers", "miners", "bytes", "broadcast")


def own_case(options: argparse.Namespace) -> Case:
    peers = options.peers or 4
    return Case(
        peers=peers,
        miners=options.miners or peers,
        nbytes=(options.bytes or NBYTES) // 4 * 4,
        broadcast=bool(options.broadcast),
    )


def run(name: str, case: Case) -> Row:
    """All contenders on one case."""
    progress(f"{name}: floor")
    raw = floor.one_way(FLOOR_BYTES, LOOPBACK)
    floor_s = floor.loopback_floor_s(case.nbytes, case.peers, raw.bytes_per_s)
    site = on_loopback(case.peers, case.miners)
    title = f"{name}: K={case.peers}, N={case.miners}, {size(case.nbytes)}"
    with PlacedSubnet(site) as subnet:
        return contest(title, case, site, subnet, floor_s) | {"raw": asdict(raw)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_contest_flags(parser, list(CASES))
    options, cases = choose(parser, CASES, OWN_FLAGS, own_case)
    settings = settings_of_run()
    print_head(settings)
    rows = []
    for name, case in cases.items():
        rows.append(run(name, case))
        raw = rows[-1]["raw"]
        print_row(
            rows[-1],
            f"raw socket {raw['bytes_per_s'] / 1e9:.2f} GB/s; CPU s per GB: send "
            f"{raw['send_cpu_s_per_GB']:.2f}, receive {raw['receive_cpu_s_per_GB']:.2f}",
        )
        write_json(options.json, settings, rows=rows)
    draw_ratios(options.png, rows, "loopback: time over 2 K D / raw socket rate")


if __name__ == "__main__":
    run_program(main)
