"""`make demo-incentive`: miners of known links, one of them a liar, and what the chain pays them.

One validator, three benchmark bots and five miners, all separate processes, on a chain with the
rules of a real one. Knows the links, what a fair share of them is, and where scores, weights and
incentive are read. Does not know how any of them is made.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mapreduce import __version__
from mapreduce.config import run_cli

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.local import LocalSubnet

LINKS_MBIT_PER_S: Final = (50, 100, 200, 400, 200)
LIAR: Final = 5  # the miner with this number
FAULT: Final = "one_ulp"
BOTS: Final = 3
TEMPO: Final = 10
WINDOW_S: Final = 20.0
SLOT_S: Final = 4.0
SECONDS: Final = 270.0
SETTINGS: Final = 2  # of weights, the last of them after the liar was banned
SHOW_S: Final = 5.0

SHARE_TOLERANCE: Final = 0.10
INCENTIVE_TOLERANCE: Final = 0.01
U16: Final = 1 / 65535  # weights and incentive are whole numbers of this on the chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A miner as its validator and the chain see it. What nobody has said yet is None; rates are of
    each direction."""

    uid: int
    link_mbit_per_s: float
    lies: bool
    measured_mbit_per_s: float | None = None
    reliability: float | None = None
    gate: float | None = None
    score: float | None = None
    weight: float = 0.0  # on the chain
    strikes: int = 0
    incentive: float = 0.0  # on the chain


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All miners at one time; `last_update` is the block at which weights were last set."""

    block: int
    last_update: int
    rows: tuple[Row, ...]

    @property
    def liar_is_out(self) -> bool:
        """Whether the validator gives liars nothing, on the chain too."""
        liars = [row for row in self.rows if row.lies]
        return all(row.gate == 0.0 and row.weight == 0.0 for row in liars)


def shares(rows: Sequence[Row]) -> dict[int, float]:
    """What each miner should get, by uid: in proportion to its link, nothing for a lie."""
    total = math.fsum(row.link_mbit_per_s for row in rows if not row.lies)
    return {row.uid: 0.0 if row.lies else row.link_mbit_per_s / total for row in rows}


def verdicts(rows: Sequence[Row]) -> dict[str, bool]:
    """The claims of the demo, by what they say."""
    honest = sorted((row for row in rows if not row.lies), key=lambda row: row.link_mbit_per_s)
    liars, fair = [row for row in rows if row.lies], shares(rows)
    total = math.fsum(row.incentive for row in rows)
    return {
        "weights_follow_bandwidth": all(
            slow.weight < fast.weight for slow, fast in itertools.pairwise(honest)
        ),
        "each_honest_miner_within_10_percent_of_its_share": all(
            abs(row.weight / fair[row.uid] - 1) <= SHARE_TOLERANCE for row in honest
        ),
        "a_proven_lie_is_paid_nothing": bool(liars)
        and all(row.gate == row.weight == row.incentive == 0.0 and row.strikes for row in liars),
        "incentive_follows_weights": total > 0
        and all(
            abs(row.incentive / total - row.weight) <= INCENTIVE_TOLERANCE * row.weight + U16
            for row in rows
        ),
    }


def table(rows: Sequence[Row]) -> list[str]:
    """One line per miner, the heaviest first."""
    fair = shares(rows)
    lines = [
        f"{'uid':>3}  {'link Mbit/s':>11}  {'measured':>8}  {'reliability':>11}  {'gate':>4}  "
        f"{'score MB/s':>10}  {'weight':>7}  {'share':>7}  {'incentive':>9}  {'strikes':>7}"
    ]
    for row in sorted(rows, key=lambda row: (-row.weight, -row.link_mbit_per_s, row.uid)):
        score = None if row.score is None else row.score / 1e6
        lines.append(
            f"{row.uid:>3}  {row.link_mbit_per_s:>11.0f}  {_cell(row.measured_mbit_per_s, 8, 1)}  "
            f"{_cell(row.reliability, 11, 3)}  {_cell(row.gate, 4, 1)}  {_cell(score, 10, 2)}  "
            f"{row.weight:>7.4f}  {fair[row.uid]:>7.4f}  {row.incentive:>9.4f}  {row.strikes:>7}"
            f"{'  lies' if row.lies else ''}"
        )
    return lines


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def read_view(subnet: LocalSubnet) -> View:
    """What the validator's state and the chain say now."""
    from mapreduce.store.database import Database
    from mapreduce.store.history import History

    metagraph, weights = asyncio.run(_read_chain(subnet))
    with Database.open_read_only(subnet.state_path) as database:
        leaders = {leader.hotkey: leader for leader in History(database).leaderboard()}
    rows = []
    for number, uid in enumerate(subnet.miner_uids, 1):
        neuron = metagraph.by_uid(uid)
        assert neuron is not None  # there are more uids than neurons: nobody is evicted
        leader = leaders.get(neuron.hotkey)
        parts: dict[str, Any] = {} if leader is None else json.loads(leader.components_json)
        goodput = parts.get("goodput_bytes_per_s")  # in and out together
        rows.append(
            Row(
                uid=uid,
                link_mbit_per_s=LINKS_MBIT_PER_S[number - 1],
                lies=f"miner-{number}" in subnet.faults,
                measured_mbit_per_s=None if goodput is None else goodput * 8e-6 / 2,
                reliability=parts.get("reliability"),
                gate=parts.get("gate"),
                score=None if leader is None else leader.score,
                weight=weights.get(uid, 0.0),
                strikes=0 if leader is None else len(leader.strikes),
                incentive=neuron.incentive,
            )
        )
    validator = metagraph.by_uid(subnet.validator_uid)
    assert validator is not None
    return View(block=metagraph.block, last_update=validator.last_update, rows=tuple(rows))


async def _read_chain(subnet: LocalSubnet) -> Any:  # the chain's types load the SDK
    from mapreduce.chain import open_chain
    from mapreduce.chain.metagraph import fetch_metagraph
    from mapreduce.chain.weights import read_weights

    async with open_chain(subnet.network) as client:
        weights = await read_weights(client, subnet.netuid, subnet.validator_uid)
        return await fetch_metagraph(client, subnet.netuid), weights


def watch(subnet: LocalSubnet, started: float, until: float) -> tuple[View, int]:
    """Shows the subnet until weights were set often enough, and an epoch has paid by them; or until
    the time is over. Returns the last view, and how often they were set."""
    view = read_view(subnet)
    settings, last_update, shown = 0, view.last_update, -math.inf
    while True:
        subnet.check()
        view = read_view(subnet)
        if view.last_update != last_update:
            settings, last_update = settings + 1, view.last_update
        enough = settings >= SETTINGS and view.liar_is_out
        done = enough and view.block >= view.last_update + TEMPO + 1
        now = time.monotonic()
        if done or now >= until or now - shown >= SHOW_S:
            phase = "measuring, no weights yet" if settings == 0 else f"weights set {settings}x"
            phase += "; waiting for the epoch that pays by them" if enough and not done else ""
            print(f"\n{now - started:.0f} s, block {view.block}: {phase}", flush=True)
            print("\n".join(table(view.rows)), flush=True)
            shown = now
        if done or now >= until:
            return view, settings
        time.sleep(1.0)


def run_demo(seconds: float) -> dict[str, Any]:
    """Runs everything and returns what `--json` writes."""
    from mapreduce.local import LocalSubnet

    started = time.monotonic()
    names = [f"miner-{number}" for number in range(1, len(LINKS_MBIT_PER_S) + 1)]
    print(
        f"starting 1 validator, {BOTS} bots and {len(names)} miners behind links of "
        f"{', '.join(str(rate) for rate in LINKS_MBIT_PER_S)} Mbit/s; miner {LIAR} lies by the "
        "last bit of one number",
        flush=True,
    )
    subnet = LocalSubnet(
        len(names),
        bots=BOTS,
        strict=True,
        tempo=TEMPO,
        limits=dict(zip(names, (rate * 1e6 for rate in LINKS_MBIT_PER_S), strict=True)),
        faults={f"miner-{LIAR}": FAULT},
        validator_flags=(
            *("--scoring.window_s", f"{WINDOW_S:g}"),
            *("--benchmark.seconds", f"{SLOT_S:g}"),
            # Who was measured first would otherwise be ahead for twelve windows.
            *("--scoring.ramp_windows", "1"),
        ),
    )
    with subnet:
        print(f"all are ready; the validator scores every {WINDOW_S:g} s", flush=True)
        view, settings = watch(subnet, started, started + seconds)
    checked = verdicts(view.rows) | {"weights_were_set_twice": settings >= SETTINGS}
    return {
        "version": __version__,
        "block": view.block,
        "settings": settings,
        "rows": [asdict(row) for row in view.rows],
        "shares": shares(view.rows),
        "verdicts": checked,
        "passed": all(checked.values()),
        "seconds": time.monotonic() - started,
    }


def show(outcome: dict[str, Any]) -> None:
    """Prints the verdicts."""
    print()
    for name, value in outcome["verdicts"].items():
        print(f"{'PASS' if value else 'FAIL'}  {name.replace('_', ' ')}")
    print(f"{outcome['seconds']:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mapreduce.demo_incentive",
        description="Runs a subnet of real processes on this machine, with miners behind links of "
        "known rates and one that lies, and reads from the chain what they are paid. Exit code 1 "
        "if anything is not as promised.",
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write the outcome as JSON")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="after which it ends, come what may (default %(default)g)",
    )
    options = parser.parse_args(argv)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds:g}: more than 0")
    outcome = run_demo(options.seconds)
    show(outcome)
    if options.json is not None:
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")
        print(f"written to {options.json}")
    return 0 if outcome["passed"] else 1


if __name__ == "__main__":
    run_cli(main)
