"""Collectives over links of a given rate, beside the floor and the rivals on the same links.

`sudo make bench-shaped` runs every case. Each peer and each miner has a link of its own (see
`lab.py`). The floor is what raw TCP carries through the same links, both ways at once:
max(D / peer's link, K D / sum of the miners' links).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
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
from bench.lab import BURST, LATENCY, Lab, enter_laboratory
from bench.relay import Relay
from bench.report import progress, run_program, settings_of_run, size, write_json
from bench.steps import RIVALS, Case
from bench.subnets import PlacedSubnet, RelayedSubnet

if TYPE_CHECKING:
    from bench.report import Row

RATE = 400.0  # Mbit/s
NBYTES = 26_000_000
OWN_FLAGS = ("peers", "miners", "bytes", "broadcast", "peer_rate", "miner_rate", "delay_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Links in Mbit/s, one entry per peer and per miner; `delay_ms` is a round trip's."""

    peers: tuple[float, ...]
    miners: tuple[float, ...]
    nbytes: int
    broadcast: bool = False
    delay_ms: float = 0.0
    steps: int = 10
    rivals: tuple[str, ...] = RIVALS

    @property
    def case(self) -> Case:
        return Case(
            peers=len(self.peers),
            miners=len(self.miners),
            nbytes=self.nbytes // 4 * 4,
            steps=self.steps,
            broadcast=self.broadcast,
            rivals=self.rivals,
        )


FAST_4, SLOW_4, SLOW_8 = (RATE,) * 4, (100.0,) * 4, (100.0,) * 8
SCENES = {
    "all-reduce-4": Scene(peers=FAST_4, miners=FAST_4, nbytes=NBYTES),
    "all-reduce-8": Scene(peers=SLOW_8, miners=SLOW_8, nbytes=13_000_000),
    "broadcast-4": Scene(peers=FAST_4, miners=FAST_4, nbytes=NBYTES, broadcast=True),
    "broadcast-8": Scene(peers=SLOW_8, miners=SLOW_8, nbytes=13_000_000, broadcast=True),
    # The ring of the peers does not meet the slow miner.
    "slow-miner": Scene(peers=FAST_4, miners=(*FAST_4[1:], 100.0), nbytes=NBYTES, rivals=()),
    "more-miners": Scene(peers=FAST_4, miners=(200.0,) * 8, nbytes=NBYTES),
    # The delay is on the way to our miners only.
    "delay": Scene(peers=SLOW_4, miners=SLOW_4, nbytes=25_000_000, delay_ms=40.0, rivals=()),
}


def own_scene(options: argparse.Namespace) -> Scene:
    """What the flags say.

    Raises:
        ValueError: they contradict each other.
    """
    peer_rate = options.peer_rate or RATE
    rates = options.miner_rate or [peer_rate]
    peers = options.peers or 4
    miners = options.miners or (len(rates) if len(rates) > 1 else peers)
    if len(rates) not in (1, miners):
        raise ValueError(f"--miner-rate has {len(rates)} entries for {miners} miners")
    return Scene(
        peers=(peer_rate,) * peers,
        miners=tuple(rates) if len(rates) > 1 else tuple(rates) * miners,
        nbytes=options.bytes or NBYTES,
        broadcast=bool(options.broadcast),
        delay_ms=options.delay_ms or 0.0,
        rivals=() if options.delay_ms else RIVALS,
    )


def run(lab: Lab, name: str, scene: Scene) -> Row:
    """Builds the scene's links, runs all contenders, removes the links."""
    case = scene.case
    site = lab.build(scene.peers, scene.miners)
    progress(f"{name}: floor")
    raw = floor.both_ways(case.nbytes, *site.peers[:2])
    per_mbit = raw / scene.peers[0]  # what a link carries is in proportion to its rate
    links = [rate * per_mbit for rate in scene.peers], [rate * per_mbit for rate in scene.miners]
    floor_s = floor.links_floor_s(case.nbytes, *links)
    title = f"{name}: K={case.peers}, N={case.miners}, {size(case.nbytes)}"
    if scene.delay_ms:
        relayed = RelayedSubnet(site)
        with Relay(lab.driver, relayed.routes, scene.delay_ms / 2000), relayed:
            row = contest(title, case, site, relayed, floor_s)
    else:
        with PlacedSubnet(site) as subnet:
            row = contest(title, case, site, subnet, floor_s)
    lab.clear()
    return row | {
        "peer_mbit_per_s": scene.peers,
        "miner_mbit_per_s": scene.miners,
        "delay_ms": scene.delay_ms,
        "raw_mbit_per_s": raw * 8e-6,
        "equal_split_floor_s": floor.equal_split_floor_s(case.nbytes, *links),
    }


def notes(row: Row) -> list[str]:
    """What is to be said of a row's links."""
    links = [
        f"{who} {', '.join(f'{rate:g}' for rate in sorted(set(row[f'{who}_mbit_per_s'])))} Mbit/s"
        for who in ("peer", "miner")
    ]
    delay = f", round trip {row['delay_ms']:g} ms" if row["delay_ms"] else ""
    told = [f"links: {'; '.join(links)}{delay}; raw TCP {row['raw_mbit_per_s']:.1f} Mbit/s"]
    equal = row["equal_split_floor_s"] / row["floor_s"]
    if equal > 1:
        told.append(
            f"first step {row['first_x_floor']:.2f} x floor; equal segments take at least "
            f"{equal:.2f} x floor"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    own = add_contest_flags(parser, list(SCENES))
    own.add_argument("--peer-rate", type=float, help=f"Mbit/s of each link (default: {RATE:g})")
    own.add_argument(
        "--miner-rate", type=float, nargs="+", help="Mbit/s, one for all miners or one for each"
    )
    own.add_argument("--delay-ms", type=float, help="round trip, by a user-space relay")
    try:
        options, scenes = choose(parser, SCENES, OWN_FLAGS, own_scene)
    except ValueError as error:
        parser.error(str(error))
    enter_laboratory()
    settings = settings_of_run(tbf={"burst": BURST, "latency": LATENCY, "rate": "see the rows"})
    lab = Lab()
    print_head(settings)
    rows = []
    for name, scene in scenes.items():
        rows.append(run(lab, name, scene))
        print_row(rows[-1], *notes(rows[-1]))
        write_json(options.json, settings, rows=rows)
    draw_ratios(options.png, rows, "shaped links: time over the floor of raw TCP")


if __name__ == "__main__":
    run_program(main)
