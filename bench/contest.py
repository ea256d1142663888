"""One case, all contenders, one run: ours beside its floor and its rivals, as a row of figures.

Knows what is compared and how it is printed; the contenders are in `ours.py` and `rivals.py`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from bench import rivals
from bench.ours import measure
from bench.report import (
    COLORS,
    Row,
    add_output_flags,
    figure,
    milliseconds,
    parse,
    print_settings,
    progress,
    save,
)
from bench.steps import RIVALS, WARM_UP_STEPS, Case, summary

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bench.lab import Site
    from bench.ours import Run
    from bench.subnets import PlacedSubnet

Scene = TypeVar("Scene", bound=Any)  # Any: a dataclass with `steps` and `rivals`

DRAWN_BYTES = 1_000_000  # a smaller tensor's floor is no measure: its ratio dwarfs all others
_HEAD = (
    f"{'case':<38}{'floor':>8}{'ours':>8}{'p95':>8}{'first':>8}{'x floor':>9}"
    f"{'gloo':>8}{'original':>10}{'hivemind':>10}"
)


# What to run ----------------------------------------------------------------------------------


def add_contest_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> Any:
    """Adds what every contest understands; returns the group of flags that describe a case of the
    user's own (Any: argparse hides its type)."""
    parser.add_argument(
        "--case", nargs="+", choices=names, metavar="NAME", help=f"only these: {', '.join(names)}"
    )
    parser.add_argument("--steps", type=int, help="counted steps of each contender")
    parser.add_argument("--no-rivals", action="store_true", help="only ours and the floor")
    add_output_flags(parser)
    own = parser.add_argument_group("one case of your own, instead")
    own.add_argument("--peers", type=int, help="K (default: 4)")
    own.add_argument("--miners", type=int, help="N (default: K)")
    own.add_argument("--bytes", type=int, help="of one tensor")
    own.add_argument("--broadcast", action="store_const", const=True, help="not an all-reduce")
    return own


def choose(
    parser: argparse.ArgumentParser,
    scenes: Mapping[str, Scene],
    own_flags: Sequence[str],
    build_own: Callable[[argparse.Namespace], Scene],
) -> tuple[argparse.Namespace, dict[str, Scene]]:
    """The options, and what to run; exits with a message if they make no sense."""
    options = parse(parser)
    for name in ("peers", "miners", "bytes", "steps"):
        value, least = getattr(options, name), 2 if name == "peers" else 1
        if value is not None and value < least:
            parser.error(f"--{name} {value}: {least} or more")
    if all(getattr(options, flag) is None for flag in own_flags):
        chosen = {name: scenes[name] for name in options.case or scenes}
    elif options.case:
        parser.error("--case and a case of your own: one or the other")
    else:
        chosen = {"own": build_own(options)}
    changes: dict[str, Any] = {"rivals": ()} if options.no_rivals else {}
    if options.steps is not None:
        changes["steps"] = options.steps
    return options, {name: dataclasses.replace(scene, **changes) for name, scene in chosen.items()}


# Running it -----------------------------------------------------------------------------------


def contest(name: str, case: Case, site: Site, subnet: PlacedSubnet, floor_s: float) -> Row:
    """Runs the case by us on a started subnet, and by its rivals."""
    progress(f"{name}: ours")
    row = our_row(name, case, floor_s, measure(subnet, site.peers, [case]))
    for rival in case.rivals:
        if case.broadcast and rival != "gloo":
            continue
        progress(f"{name}: {rival}")
        seconds = getattr(rivals, rival)(case, site)
        if seconds is not None:
            row[rival] = compare(row, seconds, 0 if rival == "hivemind" else WARM_UP_STEPS)
    return row


def our_row(name: str, case: Case, floor_s: float, run: Run) -> Row:
    """The figures of our own run."""
    ours = summary(run.seconds[0], case.warm_up)
    return {
        "case": name,
        "collective": "broadcast" if case.broadcast else "all_reduce",
        "peers": case.peers,
        "miners": case.miners,
        "bytes": case.nbytes,
        "floor_s": floor_s,
        "ours": dataclasses.asdict(ours),
        "x_floor": ours.median_s / floor_s,
        "first_x_floor": ours.all_s[0] / floor_s,
        "init_s": run.init_s,
        "cpu_s_per_GB": {"peer": run.peer_cpu_s_per_GB, "miner": run.miner_cpu_s_per_GB},
        "peak_beyond_idle_bytes": {"peer": run.peer_peak_bytes, "miner": run.miner_peak_bytes},
    }


def compare(row: Row, seconds: list[list[float]], warm_up: int) -> Row:
    """A rival's figures, given per rank and step, beside ours."""
    figures = summary(seconds, warm_up)
    return dataclasses.asdict(figures) | {"x_ours": figures.median_s / row["ours"]["median_s"]}


# Showing it -----------------------------------------------------------------------------------


def print_head(settings: Row) -> None:
    print_settings(settings)
    print("milliseconds of the slowest rank: median, 95th percentile, first step of the job;")
    print("one direction counted; rivals: times ours")
    print(_HEAD, flush=True)


def print_row(row: Row, *notes: str) -> None:
    """The row, the rivals' own figures and what else is to be said of it."""
    ours = row["ours"]
    times = (row["floor_s"], ours["median_s"], ours["p95_s"], ours["all_s"][0])
    line = f"{row['case']:<38}" + "".join(f"{milliseconds(time):>8}" for time in times)
    line += f"{row['x_floor']:9.3f}"
    for rival, width in zip(RIVALS, (8, 10, 10), strict=True):
        ratio = f"{row[rival]['x_ours']:.2f}" if rival in row else "-"
        line += f"{ratio:>{width}}"
    print(line)
    theirs = [
        f"{rival} {milliseconds(row[rival]['median_s'])} (p95 {milliseconds(row[rival]['p95_s'])})"
        for rival in RIVALS
        if rival in row
    ]
    cpu, peak = row["cpu_s_per_GB"], row["peak_beyond_idle_bytes"]
    for note in (
        "; ".join(theirs),
        f"CPU s per GB: peer {cpu['peer']:.2f}, miner {cpu['miner']:.2f}; peak beyond idle: peer "
        f"{peak['peer'] / 1e6:.0f} MB, miner {peak['miner'] / 1e6:.0f} MB; "
        f"init {row['init_s']:.2f} s",
        *notes,
    ):
        if note:
            print("   ", note)
    print(end="", flush=True)


def draw_ratios(path: Path | None, rows: Sequence[Row], title: str) -> None:
    """A bar per contender and case: its time over the floor."""
    rows = [row for row in rows if row["bytes"] >= DRAWN_BYTES]
    if path is None or not rows:
        return
    present = [name for name in COLORS if any(name in row for row in rows)]
    drawing, axes = figure(1, 1, 8, 0.8 + 0.6 * len(rows))
    height = 0.8 / len(present)
    for index, name in enumerate(present):
        places = [
            (place + (index - (len(present) - 1) / 2) * height, row)
            for place, row in enumerate(rows)
            if name in row
        ]
        ratios = [row[name]["median_s"] / row["floor_s"] for _, row in places]
        bars = axes.barh([y for y, _ in places], ratios, height, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt=" %.2f", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / floor")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    save(drawing, path)
