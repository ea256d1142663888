"""The validator's state at full size: how large the file is, and what a window and a look cost.

`python -m bench.state` fills a file as a validator would, window after window up to now: every
miner measured, real jobs, scores, weights, now and then a lie, and what is too old pruned. The
last windows are also scored, as the validator does at the end of each; before them the same scores
are written again and again. The floor is the same rows in a bare SQLite file, without indexes and
without pruning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.report import (
    add_output_flags,
    milliseconds,
    parse,
    print_settings,
    progress,
    run_program,
    settings_of_run,
    write_json,
)
from mapreduce.core import scoring
from mapreduce.core.scoring import (
    OwnerSeen,
    OwnerView,
    ScoringConfig,
    Standing,
    advance,
    from_json,
    score_all,
    to_json,
)
from mapreduce.services.scorer import components_json
from mapreduce.store.database import Database
from mapreduce.store.history import History, Measurement, Outcome, Score, Seen
from mapreduce.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG: Final = ScoringConfig()
NOW: Final = 1_800_000_000.0  # a run depends on no clock
SLOT_MINERS: Final = 3  # as many as there are bots: three are recommended
MEASURED_AGAIN: Final = 4  # every fourth miner proves faster than its estimate
REAL_JOBS: Final = 64  # of SLOT_MINERS miners each, per window
OWNERS: Final = 16  # of real jobs, that a standing remembers
LIE_EVERY: Final = 100  # windows
EVIDENCE_BYTES: Final = 150_000  # openings of K = 8
TARGET_BYTES, TARGET_WINDOW_S, TARGET_LOOK_S = 200e6, 1.0, 0.050
LOOKS: Final = 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What one filled file showed; `score_s` is to score one of the last windows (reading what it
    goes by included), `window_s` is to write and prune it."""

    file_bytes: int
    rows: int
    fill_s: float
    score_s: float
    window_s: float
    window_floor_s: float
    leaderboard_s: float
    leaderboard_floor_s: float
    miner_page_s: float


class Filler:
    """Writes windows of one subnet into a file, as the services of a validator do."""

    def __init__(self, database: Database, miners: int, rng: random.Random) -> None:
        self.history, self.ledger = History(database), Ledger(database)
        self._rng = rng
        self._seen = [
            Seen(
                uid=uid,
                hotkey=_address(f"hot{uid}"),
                coldkey=_address(f"cold{uid}"),
                ip=f"192.0.2.{uid % 256}",
            )
            for uid in range(miners)
        ]
        self.hotkeys = [seen.hotkey for seen in self._seen]
        owners = [_address(f"owner{number}") for number in range(OWNERS)]
        self._owners = owners
        self._standings: dict[str, str] = {}
        self._scores: dict[str, Score] = {}
        self._keep({hotkey: self._standing(owners) for hotkey in self.hotkeys})
        self._vector = json.dumps(dict.fromkeys(range(miners), 65535))

    def _standing(self, owners: list[str]) -> Standing:
        noise = self._rng.random
        views = {
            owner: OwnerView(completed=99 * noise(), failed=noise(), rated_jobs=99, ratio=noise())
            for owner in owners
        }
        return Standing(
            goodput_bytes_per_s=1e8 * noise(),
            windows_measured=1000,
            completed=50 * noise(),
            failed=noise(),
            latency_s=noise(),
            owners=views,
        )

    def _keep(self, standings: dict[str, Standing]) -> None:
        """Scores these standings; `close` writes both."""
        scored = score_all(
            standings,
            banned={},
            disputed=frozenset(),
            clusters={},
            cap_bytes_per_s=1e9,
            config=CONFIG,
        )
        self._standings = {hotkey: to_json(standing) for hotkey, standing in standings.items()}
        self._scores = {
            hotkey: Score(
                rank=rank,
                score=parts.score,
                weight=parts.weight,
                components_json=components_json(parts),
            )
            for rank, (hotkey, parts) in enumerate(scored.items(), 1)
        }

    def measurements(self, window: int, at: float) -> Iterator[list[Measurement]]:
        """The slots of one window."""
        again = self._rng.sample(self.hotkeys, len(self.hotkeys) // MEASURED_AGAIN)
        turns = [*self._rng.sample(self.hotkeys, len(self.hotkeys)), *again]
        for first in range(0, len(turns), SLOT_MINERS):
            job = self._rng.randbytes(16).hex()
            yield [
                Measurement(
                    at=at + first,
                    window=window,
                    job=job,
                    hotkey=hotkey,
                    outcome="measured" if first < len(self.hotkeys) else "void",
                    goodput_bytes_per_s=1e8 * self._rng.random(),
                    latency_s=self._rng.random(),
                    seconds=10 * self._rng.random(),
                    bytes=self._rng.randrange(10**9),
                    reason="" if first < len(self.hotkeys) else "faster; measured once more",
                )
                for hotkey in turns[first : first + SLOT_MINERS]
            ]

    def outcomes(self, at: float) -> list[Outcome]:
        """What the real jobs of one window showed."""
        return [
            Outcome(
                job=job,
                owner=self._rng.choice(self._owners),
                hotkey=hotkey,
                completed=20,
                failed=0,
                ratio=self._rng.random(),
                at=at,
            )
            for job in (self._rng.randbytes(16).hex() for _ in range(REAL_JOBS))
            for hotkey in self._rng.sample(self.hotkeys, SLOT_MINERS)
        ]

    def measure(self, at: float, slots: list[list[Measurement]], outcomes: list[Outcome]) -> None:
        """All that a validator writes before the end of a window."""
        self.history.see(self._seen, at)
        for slot in slots:
            self.history.add_slot(slot)
        self.history.add_outcomes(outcomes)

    def score(self, begin: float) -> None:
        """The scores of the window that began then, from what the file holds."""
        standings = {h: from_json(text) for h, text in self.history.standings().items()}
        goodputs: defaultdict[str, list[float]] = defaultdict(list)
        owners: defaultdict[str, dict[str, OwnerSeen]] = defaultdict(dict)
        for row in self.history.measurements(begin):
            if row.outcome != "void":
                goodputs[row.hotkey].append(row.goodput_bytes_per_s)
        for outcome in self.history.outcomes(begin):
            ratios = () if outcome.ratio is None else (outcome.ratio,)
            owners[outcome.hotkey][outcome.owner] = OwnerSeen(
                completed=outcome.completed, failed=outcome.failed, ratios=ratios
            )
        for hotkey in goodputs.keys() | owners.keys():
            brought = scoring.Seen(
                goodputs_bytes_per_s=tuple(goodputs[hotkey]),
                completed=len(goodputs[hotkey]),
                latencies_s=(0.1,),
                owners=owners[hotkey],
            )
            standings[hotkey] = advance(standings.get(hotkey, Standing()), brought, CONFIG)
        self._keep(standings)

    def close(self, window: int, at: float) -> None:
        """All that a validator writes at the end of a window, and the pruning."""
        self.history.close_window(window, at, self._standings, self._scores)
        self.history.add_weights(
            at=at, block=window * 360, vector_json=self._vector, result="set", reason=""
        )
        if window % LIE_EVERY == 0:
            self.ledger.add_proof(
                f"{window:064x}",
                kind="F1",
                role="miner",
                culprit=self._rng.choice(self.hotkeys),
                job="",
                step=0,
                segment=0,
                data=self._rng.randbytes(EVIDENCE_BYTES),
                now=at,
            )
        self.history.prune(at)
        self.ledger.prune(at, CONFIG.ban_s)


class Floor:
    """The same rows in a file with nothing but tables, one transaction for a whole window."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        columns = ", ".join(f"c{number}" for number in range(10))
        self._connection.execute(f"CREATE TABLE measurements ({columns})")
        self._connection.execute("CREATE TABLE outcomes (c0, c1, c2, c3, c4, c5, c6)")
        self._connection.execute("CREATE TABLE standings (c0, c1)")
        self._connection.execute("CREATE TABLE scores (c0, c1, c2, c3, c4)")

    def write_window(
        self, slots: list[list[Measurement]], outcomes: list[Outcome], filler: Filler
    ) -> None:
        insert = self._connection.executemany
        self._connection.execute("BEGIN")
        rows = (tuple(_values(row)) for slot in slots for row in slot)
        insert(f"INSERT INTO measurements VALUES ({', '.join('?' * 10)})", rows)
        insert("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)", map(_values, outcomes))
        insert("INSERT INTO standings VALUES (?, ?)", filler._standings.items())
        self._connection.execute("DELETE FROM scores")
        scores = ((hotkey, *_values(score)) for hotkey, score in filler._scores.items())
        insert("INSERT INTO scores VALUES (?, ?, ?, ?, ?)", scores)
        self._connection.execute("COMMIT")

    def leaderboard(self) -> list[Any]:  # Any: rows without a type
        return self._connection.execute("SELECT * FROM scores").fetchall()

    def close(self) -> None:
        self._connection.close()


def fill_and_measure(directory: Path, miners: int, rounds: int, seed: int) -> Figures:
    """A file of so many windows that ends now, and what it costs."""
    path = directory / "validator.sqlite"
    begun = time.perf_counter()
    reckoning, writing, flooring = [], [], []
    with Database.open(path) as database:
        filler = Filler(database, miners, random.Random(seed))
        floor = Floor(directory / "floor.sqlite")
        for window in range(rounds):
            if window % 1000 == 0:
                progress(f"window {window} of {rounds}")
            at = NOW - (rounds - window) * CONFIG.window_s
            slots, outcomes = list(filler.measurements(window, at)), filler.outcomes(at)
            begin = time.perf_counter()
            filler.measure(at, slots, outcomes)
            measured = time.perf_counter()
            if window >= rounds - LOOKS:
                filler.score(at)
            scored = time.perf_counter()
            filler.close(window, at)
            written = time.perf_counter()
            if window >= rounds - LOOKS:
                reckoning.append(scored - measured)
                writing.append(written - scored + measured - begin)
                floor.write_window(slots, outcomes, filler)
                flooring.append(time.perf_counter() - written)
        fill_s = time.perf_counter() - begun
        history = filler.history
        rows = sum(
            database.execute(f"SELECT COUNT(*) FROM {table}")[0][0]
            for table in ("measurements", "outcomes", "scores", "days", "windows", "weights")
        )
        leaderboard_s = _median_s(history.leaderboard)
        page_s = _median_s(lambda: history.history_of(filler.hotkeys[0], 0.0))
        floor_s = _median_s(floor.leaderboard)
        floor.close()
    return Figures(
        file_bytes=path.stat().st_size,  # closed: the log is in it
        rows=rows,
        fill_s=fill_s,
        score_s=statistics.median(reckoning),
        window_s=statistics.median(writing),
        window_floor_s=statistics.median(flooring),
        leaderboard_s=leaderboard_s,
        leaderboard_floor_s=floor_s,
        miner_page_s=page_s,
    )


def _median_s(look: Callable[[], object]) -> float:
    seconds = []
    for _ in range(LOOKS):
        begun = time.perf_counter()
        look()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _address(name: str) -> str:
    """As long as an ss58 address."""
    return "5" + hashlib.sha256(name.encode()).hexdigest()[:47]


def _values(row: Measurement | Outcome | Score) -> tuple[Any, ...]:  # Any: what a column takes
    return tuple(asdict(row).values())


def print_figures(figures: Figures) -> None:
    """The figures beside their targets and floors."""
    within = "within" if figures.file_bytes < TARGET_BYTES else "ABOVE"
    print(
        f"file                 {figures.file_bytes / 1e6:8.1f} MB, {figures.rows} rows; "
        f"{within} {TARGET_BYTES / 1e6:.0f} MB"
    )
    both_s = figures.score_s + figures.window_s
    within = "within" if both_s < TARGET_WINDOW_S else "ABOVE"
    print(
        f"score, write a window{milliseconds(both_s):>9} ms; {within} "
        f"{milliseconds(TARGET_WINDOW_S)} ms"
    )
    print(
        f"write, prune a window{milliseconds(figures.window_s):>9} ms; "
        f"bare SQLite {milliseconds(figures.window_floor_s)} ms"
    )
    within = "within" if figures.leaderboard_s < TARGET_LOOK_S else "ABOVE"
    print(
        f"leaderboard          {milliseconds(figures.leaderboard_s):>8} ms; {within} "
        f"{milliseconds(TARGET_LOOK_S)} ms; "
        f"bare SQLite {milliseconds(figures.leaderboard_floor_s)} ms"
    )
    print(f"a miner's whole page {milliseconds(figures.miner_page_s):>8} ms")
    print(f"filled in            {figures.fill_s:8.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--miners", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10_000, help="windows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    add_output_flags(parser)
    options = parse(parser)
    if options.miners < SLOT_MINERS or options.rounds < LOOKS:
        parser.error(f"{SLOT_MINERS} miners and {LOOKS} rounds or more are needed")
    settings = settings_of_run(miners=options.miners, rounds=options.rounds, seed=options.seed)
    print_settings(settings)
    with tempfile.TemporaryDirectory() as directory:
        figures = fill_and_measure(Path(directory), options.miners, options.rounds, options.seed)
    print_figures(figures)
    write_json(options.json, settings, figures=asdict(figures))


if __name__ == "__main__":
    run_program(main)
