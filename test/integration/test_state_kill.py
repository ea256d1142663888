"""A validator that is killed at any moment goes on from the last window that it had closed."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mapreduce.store.database import Database
from mapreduce.store.history import History

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 20  # `make test` takes a tenth
MINERS = 16
WINDOW_S = 3600.0  # 168 windows in the seven days that are kept raw: most are aggregated
MOST_WINDOWS = 80  # of one process before it is killed

# Goes on where the process before was killed. A window: its slot, its end, and what is too old.
WRITER = f"""
import sys
from pathlib import Path
from mapreduce.store.database import Database
from mapreduce.store.history import History, Measurement, Score, Seen

hotkeys = [f"m{{n}}" for n in range({MINERS})]
history = History(Database.open(Path(sys.argv[1])))
last = history.last_window()
window = 0 if last is None else last[0] + 1
while True:
    at = window * {WINDOW_S}
    history.see([Seen(uid=n, hotkey=h, coldkey="c", ip=None) for n, h in enumerate(hotkeys)], at)
    if not history.measurements(at):
        history.add_slot([
            Measurement(at=at, window=window, job=f"job{{window}}", hotkey=hotkey,
                        outcome="measured", goodput_bytes_per_s=1e6, latency_s=0.1, seconds=10.0,
                        bytes=10**7, reason="")
            for hotkey in hotkeys
        ])
    history.close_window(
        window, at, dict.fromkeys(hotkeys, str(window)),
        {{h: Score(rank=1, score=float(window), weight=0.0625, components_json="x" * 2000)
          for h in hotkeys}},
    )
    sys.stdout.write("x")
    sys.stdout.flush()
    history.prune(at)
    window += 1
"""


def kill_after(path: Path, windows: int) -> int:
    """Has a process write and kills it somewhere after so many windows; how many it reported."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        try:
            reported = len(writer.stdout.read(windows))
        finally:
            writer.kill()
        return reported + len(writer.stdout.read())


def check(path: Path, reported: int) -> int:
    """Nothing that was reported is lost, nothing is there by halves or twice; how many windows."""
    with Database.open(path) as database:
        assert database.execute("PRAGMA quick_check") == [("ok",)]
        history = History(database)
        last = history.last_window()
        assert last is not None
        closed = last[0] + 1
        assert closed - reported in (0, 1)  # the one that it was about to report
        hotkeys = {f"m{number}" for number in range(MINERS)}
        assert history.standings() == dict.fromkeys(hotkeys, str(last[0]))
        assert {row.uid for row in history.known().values()} == set(range(MINERS))
        slots = set()
        for hotkey in hotkeys:
            found = history.history_of(hotkey, 0.0)
            raw = [window for window, _, _ in found.scores]
            assert raw == list(range(raw[0], closed))
            assert all(score.score == window for window, _, score in found.scores)
            assert sum(day.windows for day in found.days) == raw[0]
            slots.add(sum(day.measured for day in found.days) + len(found.measurements))
        (measured,) = slots  # the same of all
        assert measured - closed in (0, 1)
        return closed


@pytest.mark.parametrize(
    "kills", [KILLS // 10, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["a_tenth", "all"]
)
def test_a_validator_killed_at_random_loses_no_window(tmp_path: Path, kills: int) -> None:
    path = tmp_path / "validator.sqlite"
    rng = random.Random(kills)
    closed = 0
    for _ in range(kills):
        closed = check(path, closed + kill_after(path, rng.randrange(1, MOST_WINDOWS)))
