"""Update after update while jobs run: no job is lost, and nothing is left behind.

Real pip, real self-checks, and the times that an operator's neurons are given.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from mapreduce import __version__
from mapreduce.errors import MapReduceError
from mapreduce.store.database import Database
from test.updates.fleet import UpdatingSubnet

if TYPE_CHECKING:
    from pathlib import Path

    from peer import Peer

UPDATES = 10
NEURONS = ("validator", "miner-1", "miner-2")  # a third miner stays as it is
UPDATE_S = 420.0
PEERS = 2
STEPS = 25
PAUSE_S = 0.1
STOP = "stop"
NEVER_READY = (
    "mapreduce/services/neuron.py",
    "                self._not_ready = None\n",
    "                await asyncio.sleep(3600)\n",
)
NO_CHECK = (
    "mapreduce/selfcheck.py",
    "    with LocalSubnet(",
    "    return 0\n    with LocalSubnet(",
)


@dataclass
class Load:
    """What a rank has seen: jobs that went well, and what ended the others."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def work(peer: Peer, stop: Path) -> Load:
    """One job after the other, of some seconds each, until rank 1 sees the file."""
    load = Load()
    peer.destroy_process_group()
    stopping = False
    while not stopping:
        try:
            peer.init_process_group()
        except MapReduceError as error:
            load.refused.append(f"{type(error).__name__}: {error}")
            time.sleep(1.0)
            continue
        try:
            for _ in range(STEPS):
                tensor = np.full(20_000, float(peer.rank), dtype=np.float32)
                tensor[0] = stop.exists() and peer.rank == 1
                peer.all_reduce(tensor, op="sum")
                assert float(tensor[-1]) == PEERS * (PEERS + 1) / 2
                stopping = bool(tensor[0])
                time.sleep(PAUSE_S)
            load.jobs += 1
        except MapReduceError as error:
            load.lost.append(f"{type(error).__name__}: {error}")
        with contextlib.suppress(MapReduceError):
            peer.destroy_process_group()
    peer.init_process_group()  # as `run` expects it
    return load


def work_here(peer: Peer) -> Load:
    """`work`, with the file that the test makes."""
    from pathlib import Path

    return work(peer, Path(peer.network.removeprefix("embedded:")).parent / STOP)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_updates_under_load(tmp_path: Path) -> None:
    flags = ("--auto_update.every", "2", "--auto_update.delay", "0")
    levels = dict.fromkeys(NEURONS, "patch")
    with UpdatingSubnet(tmp_path, levels, fast=False, flags=flags, miners=3, bots=2) as fleet:
        loads: list[Load] = []
        running = threading.Thread(
            target=lambda: loads.extend(
                fleet.run(work_here, PEERS, 80_000, miner_count=1, timeout_s=3600)
            )
        )
        running.start()
        major, minor, patch = (int(part) for part in __version__.split("."))
        for number in range(1, UPDATES + 1):
            version = f"{major}.{minor}.{patch + number}"
            fleet.origin.release(version)
            began = time.monotonic()
            for name in NEURONS:
                fleet.wait_log(name, f"updated version={version}", UPDATE_S)
            print(f"{version}: all three after {time.monotonic() - began:.0f} s")
            assert running.is_alive()
            assert_tidy(fleet, [version])
        broken = f"{major}.{minor}.{patch + UPDATES + 1}"
        fleet.origin.release(broken, NEVER_READY, NO_CHECK)
        for name in NEURONS:
            log = fleet.wait_log(name, "rolled back", UPDATE_S)
            times = {
                what: datetime.fromisoformat(re.findall(rf"(?m)^(\S+) .*{what}", log)[-1])
                for what in (f"updating .*to={broken}", "rolled back")
            }
            began_at, ended_at = times.values()
            print(f"{name}: rolled back after {(ended_at - began_at).total_seconds():.1f} s")
        assert_tidy(fleet, [version])
        (fleet.directory / STOP).touch()
        running.join(120)
        for load in loads:
            print(f"{load.jobs} jobs, {len(load.lost)} lost, {len(load.refused)} refused")
            assert load.lost == []
            assert load.refused == []
            assert load.jobs > UPDATES
        assert len(loads) == PEERS
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_a_supervisor_killed_anywhere_in_an_update_goes_on_where_it_was(
    tmp_path: Path, seed: int
) -> None:
    """Without pip, so that there are many updates to be killed in."""
    moments = random.Random(seed)
    times = {"TRY_PROBATION_S": "2", "TRY_READY_S": "15"}
    major, minor, patch = (int(part) for part in __version__.split("."))
    with UpdatingSubnet(tmp_path, {"validator": "patch"}, environ=times, miners=1) as fleet:
        for number in range(1, 5):
            version = f"{major}.{minor}.{patch + number}"
            fleet.origin.release(version)
            fleet.wait_log("validator", f"to={version}", UPDATE_S)
            time.sleep(moments.uniform(0, 4))
            validator = fleet.validator
            assert validator is not None
            children = psutil.Process(validator.pid).children(recursive=True)
            validator.kill()
            _, alive = psutil.wait_procs(children, timeout=5.0)
            assert alive == []
            fleet.restart_validator()
            file = next((fleet.checkout / ".releases").glob("validator-*.json"))
            deadline = time.monotonic() + UPDATE_S
            while json.loads(file.read_text())["current"] != version:
                assert time.monotonic() < deadline, fleet.log("validator")[-4000:]
                time.sleep(0.2)
            with Database.open_read_only(fleet.state_path) as database:
                assert database.execute("PRAGMA integrity_check") == [("ok",)]
            assert fleet.run(sum_once, PEERS, 4000) == [3.0] * PEERS
        assert fleet.installed() == [version]
        assert not list(fleet.directory.glob("*-aside*"))


def sum_once(peer: Peer) -> float:
    tensor = np.full(1000, float(peer.rank), dtype=np.float32)
    return float(np.asarray(peer.all_reduce(tensor, op="sum"))[0])


def assert_tidy(fleet: UpdatingSubnet, versions: list[str]) -> None:
    """Two processes for each neuron that updates itself, one environment, no copies of states."""
    assert fleet.installed() == versions
    for name in NEURONS:
        lines = [
            line for line in processes_of(fleet.directory) if f"--wallet.hotkey {name} " in line
        ]
        assert len(lines) == 2, lines
    assert not list(fleet.directory.glob("*-aside*"))


def processes_of(directory: Path) -> list[str]:
    """The command lines of all processes that name the directory."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(directory) in line:
                lines.append(line)
    return lines
