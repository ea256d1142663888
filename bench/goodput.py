"""What benchmark bots measure of miners behind links of a given rate, beside that rate and raw TCP.

`sudo make bench-goodput` measures one miner after the other with three bots, as a validator does:
real processes, real chain rules, the shipped configuration but for the length of a window. Target:
within 10 % of the rate, from 50 to 800 Mbit/s.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import floor
from bench.lab import BURST, LATENCY, Lab, enter_laboratory
from bench.report import progress, run_program, settings_of_run, write_json
from bench.subnets import PlacedSubnet
from mapreduce.store.database import Database
from mapreduce.store.history import History

if TYPE_CHECKING:
    from bench.lab import Site
    from mapreduce.store.history import Measurement

RATES = (50.0, 100.0, 200.0, 400.0, 800.0)  # Mbit/s
BOTS = 3
LONGEST_S = 300.0
NBYTES = 25_000_000  # for raw TCP


def measured(site: Site, rates: tuple[float, ...], seconds: float, count: int) -> list[list[float]]:
    """For each miner, `count` measurements in Mbit/s each way, from slots of `seconds`."""
    flags = (
        *("--scoring.window_s", str(2 * seconds * len(rates))),
        *("--benchmark.seconds", str(seconds)),
        *("--max_bandwidth", str(int(BOTS * site_rate(rates) * 1e6))),
    )
    with PlacedSubnet(site, bots=BOTS, validator_flags=flags) as subnet:
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            time.sleep(1.0)
            subnet.check()
            with Database.open_read_only(subnet.state_path) as database:
                history = History(database)
                rows = history.measurements(0.0)
                uids = {known.hotkey: known.uid for known in history.known().values()}
            by_miner = [_of(rows, uids, uid) for uid in range(1, len(rates) + 1)]
            if all(len(found) >= count for found in by_miner):
                return [found[:count] for found in by_miner]
    raise SystemExit(f"no {count} measurements of each miner in {LONGEST_S:g} s: {by_miner}")


def site_rate(rates: tuple[float, ...]) -> float:
    """Mbit/s of each bot's link: together three times what the fastest miner carries."""
    return max(rates)


def _of(rows: list[Measurement], uids: dict[str, int | None], uid: int) -> list[float]:
    return [
        row.goodput_bytes_per_s * 8e-6 / 2
        for row in rows
        if uids.get(row.hotkey) == uid and row.outcome == "measured"
    ]


def run(lab: Lab, rates: tuple[float, ...], seconds: float, count: int) -> list[dict[str, Any]]:
    """One row per miner."""
    site = lab.build((site_rate(rates),) * BOTS, rates)
    raw = [floor.both_ways(NBYTES, site.peers[0], miner) * 8e-6 for miner in site.miners]
    found = measured(site, rates, seconds, count)
    lab.clear()
    return [
        {
            "rate_mbit_per_s": rate,
            "raw_mbit_per_s": carried,
            "measured_mbit_per_s": median(values),
            "all_mbit_per_s": values,
            "over_rate": median(values) / rate,
            "over_raw": median(values) / carried,
        }
        for rate, carried, values in zip(rates, raw, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="Mbit/s, of miners")
    parser.add_argument(
        "--together", action="store_true", help="all miners in one subnet, not one after the other"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of a slot (default: 10)")
    parser.add_argument("--count", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    enter_laboratory()
    settings = settings_of_run(tbf={"burst": BURST, "latency": LATENCY, "rate": "see the rows"})
    lab = Lab()
    rates = tuple(options.rates)
    groups = [rates] if options.together else [(rate,) for rate in rates]
    print(
        f"{BOTS} bots, slots of {options.seconds:g} s, median of {options.count}; Mbit/s each way"
    )
    print(f"{'rate':>6} {'raw TCP':>8} {'measured':>9} {'over rate':>10} {'over raw':>9}")
    rows = []
    for group in groups:
        progress(f"miners at {', '.join(f'{rate:g}' for rate in group)} Mbit/s")
        for row in run(lab, group, options.seconds, options.count):
            rows.append(row)
            print(
                f"{row['rate_mbit_per_s']:6g} {row['raw_mbit_per_s']:8.1f} "
                f"{row['measured_mbit_per_s']:9.1f} {row['over_rate']:10.3f} {row['over_raw']:9.3f}"
            )
        write_json(options.json, settings, rows=rows)


if __name__ == "__main__":
    run_program(main)
