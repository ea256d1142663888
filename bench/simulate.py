"""The incentive over hundreds of windows: what every kind of party earns, beside the promises.

`make simulate`. All parties live in one subnet and are scored by the shipped modules. Pay is weight
per capacity, as a multiple of what the honest miners get; the properties after it are measured on
subnets of their own (`properties.py`).
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.incentive import Miner, Owner, Subnet, log_uniform, pay
from bench.properties import PROPERTIES
from bench.report import (
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

if TYPE_CHECKING:
    from pathlib import Path

    from bench.report import Row

WASHERS: Final = frozenset({"washing"})
VICTIMS: Final = frozenset({"slandered"})
OWNERS: Final = [*[Owner()] * 8, *[Owner(praises=WASHERS)] * 2, *[Owner(slanders=VICTIMS)] * 2]
MEANING: Final = {
    "honest": "capacities over two decades, 1 % timeouts",
    "slow": "honest, a tenth of the middle capacity",
    "lazy": "skips the work in every job",
    "cheating": "lies in 5 % of its jobs, found in 20 % of them",
    "two-faced": "half speed for users",
    "sybil, one address": "4 uids on one line and address",
    "sybil, hidden": "4 uids on one line, addresses apart",
    "washing": "two-faced, praised by 2 of 12 owners",
    "slandered": "honest, slandered by 2 of 12 owners",
    "newcomer": "joins at half time",
    "dying": "dies at half time",
}


def population(miners: int, windows: int, seed: int) -> list[Miner]:
    """A subnet of all kinds, a quarter or more of it honest."""
    each = max(4, miners // 16 // 4 * 4)
    middle = 125e6 / 10
    habits: dict[str, dict[str, Any]] = {  # Any: a dataclass's arguments
        "lazy": {"cheats": 1.0, "detected": 0.99},
        "cheating": {"cheats": 0.05, "detected": 0.2},
        "two-faced": {"speed_for_users": 0.5},
        "washing": {"speed_for_users": 0.5},
        "newcomer": {"joins": windows // 2},
        "dying": {"leaves": windows // 2},
    }
    others = []
    for kind in MEANING:
        for index in range(each if kind != "honest" else 0):
            habit = dict(habits.get(kind, {}))
            if kind.startswith("sybil"):
                habit["pipe"] = f"{kind} {index // 4}"
                habit["network"] = habit["pipe"] if kind == "sybil, one address" else ""
            capacity = middle / 10 if kind == "slow" else middle
            others.append(Miner(kind=kind, capacity_bytes_per_s=capacity, **habit))
    honest = log_uniform(miners - len(others), 2, seed)
    return [Miner(kind="honest", capacity_bytes_per_s=capacity) for capacity in honest] + others


def simulate(miners: int, windows: int, seed: int) -> tuple[dict[str, list[float]], float]:
    """Pay in each window by kind (0 before it joins), and seconds that a window took to score."""
    subnet = Subnet(population(miners, windows, seed), seed=seed, owners=OWNERS)
    history: dict[str, list[float]] = {kind: [] for kind in MEANING}
    scoring = []
    for window in range(windows):
        subnet.run(1)
        began = time.perf_counter()
        subnet.scores()
        scoring.append(time.perf_counter() - began)
        now = pay(subnet)
        for kind, line in history.items():
            line.append(now.get(kind, 0.0))
        if window % 50 == 49:
            progress(f"{window + 1} of {windows} windows")
    return history, float(np.median(scoring))


def print_pay(history: dict[str, list[float]]) -> None:
    """Pay by kind, early, late and over all."""
    print(f"\n{'pay over honest pay':20} {'window 1-20':>12} {'last 20':>9} {'all':>7}")
    for kind, line in history.items():
        early, late, all_of_it = (float(np.mean(part)) for part in (line[:20], line[-20:], line))
        print(f"{kind:20} {early:12.3f} {late:9.3f} {all_of_it:7.3f}  {MEANING[kind]}")


def measure_properties(scale: float, seed: int) -> list[Row]:
    """The figures of every property, printed as they come."""
    rows: list[Row] = []
    print(f"\n{'property':24} {'measured':>10} {'bound':>10}")
    for name, measure in PROPERTIES.items():
        for found in measure(scale, seed):
            sign = ">=" if found.at_least else "<="
            bound = "" if found.bound is None else f"{sign} {found.bound:g}"
            verdict = "" if found.holds else "  NOT HELD"
            print(f"{name:24} {found.value:10.4g} {bound:>10}  {found.what}{verdict}", flush=True)
            rows.append(
                {
                    "property": name,
                    "what": found.what,
                    "value": float(found.value),
                    "bound": found.bound,
                }
                | {"holds": found.holds}
            )
    return rows


def draw(path: Path, history: dict[str, list[float]]) -> None:
    """Pay over time, a small picture per kind."""
    drawing, axes = figure(3, 4, 13, 8)
    for axis, (kind, line) in zip(axes.flat, history.items(), strict=False):
        axis.axhline(1.0, color="0.8")
        axis.plot(range(1, len(line) + 1), line)
        axis.set_title(f"{kind}\n{MEANING[kind]}", fontsize=8)
        axis.set_ylim(0, max(1.5, 1.1 * max(line)))
    axes.flat[-1].set_axis_off()
    drawing.supxlabel("window of 72 minutes")
    drawing.supylabel("weight per capacity, over that of honest miners")
    save(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--miners", type=int, default=256)
    parser.add_argument("--windows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the properties' scenes")
    add_output_flags(parser)
    options = parse(parser)
    if not 64 <= options.miners <= 512 or options.windows < 40 or options.scale < 0.1:
        parser.error("64 to 512 miners, 40 windows or more and a scale of 0.1 or more are needed")
    settings = settings_of_run(
        miners=options.miners, windows=options.windows, seed=options.seed, scale=options.scale
    )
    print_settings(settings)
    history, scoring_s = simulate(options.miners, options.windows, options.seed)
    print_pay(history)
    print(f"\nscores of {options.miners} miners: {scoring_s * 1e3:.1f} ms a window")
    rows = measure_properties(options.scale, options.seed)
    write_json(options.json, settings, pay=history, scoring_s=scoring_s, properties=rows)
    if options.png is not None:
        draw(options.png, history)


if __name__ == "__main__":
    run_program(main)
