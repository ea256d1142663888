"""How every benchmark is started and tells its results: flags, progress, JSON, Ctrl+C, drawing.

Knows nothing of what is measured. matplotlib is loaded only to draw.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from mapreduce.net.loop import new_event_loop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

Row: TypeAlias = dict[str, Any]  # Any: JSON

OURS, FLOOR = "#1f6feb", "#24292f"
COLORS = {"ours": OURS, "gloo": "#9aa4b2", "original": "#d29922", "hivemind": "#8957e5"}


def run_program(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and ends the process; Ctrl+C is a line and exit code 130.

    A SIGTERM too ends in good order what was started.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def progress(text: str) -> None:
    """Says what goes on, as it may take minutes; apart from the results."""
    print(text, "...", file=sys.stderr, flush=True)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--png", type=Path, metavar="PATH", help="also draw them (matplotlib)")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, once the results can be written where they say; else exits with a message."""
    options = parser.parse_args()
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install -e '.[bench]'")
    for path in (options.json, options.png):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    return options


def settings_of_run(**others: Any) -> Row:
    """What a reader needs to repeat the run."""
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    tcp = congestion.read_text().strip() if congestion.exists() else "TCP"
    module = sys.modules["__main__"].__spec__
    loop = new_event_loop()
    loop.close()
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"{tcp}, Python {platform.python_version()}, {type(loop).__module__}, "
        f"torch {version('torch')}, numpy {version('numpy')}"
    )
    command = " ".join(["python", "-m", module.name if module else "bench", *sys.argv[1:]])
    return {"command": command, "machine": machine} | others


def print_settings(settings: Row) -> None:
    print(f"{settings['command']}\n{settings['machine']}", flush=True)


def write_json(path: Path | None, settings: Row, **results: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(settings | results, indent=2) + "\n")


def milliseconds(seconds: float) -> str:
    """Four digits, whether it took a tenth of a millisecond or seconds."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:#.4g}"


def size(nbytes: float) -> str:
    """4 KiB, 1.5 MiB; or 105 MB if that is shorter."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes % factor == 0:
            return f"{nbytes / factor:g} {unit}"
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e5 else f"{nbytes:g} bytes"


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes (Any: matplotlib is not everywhere); save it with `save`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained")
    return drawing, axes


def save(drawing: Any, path: Path) -> None:
    drawing.savefig(path, dpi=100)
