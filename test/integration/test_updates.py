"""Neurons that change themselves to newer releases: real repositories, tags, processes and jobs.

Most tests leave pip out (`test/updates/neuron.py`); one does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from mapreduce import __version__
from mapreduce.errors import LocalError
from mapreduce.local import NETUID
from mapreduce.store.database import Database
from test.updates.fleet import UpdatingSubnet
from test.updates.repository import git

if TYPE_CHECKING:
    from pathlib import Path

    from peer import Peer

QUICK = {"TRY_PROBATION_S": "2", "TRY_READY_S": "8"}
READY = "miner is ready"


def sum_once(peer: Peer) -> float:
    tensor = np.full(1000, float(peer.rank), dtype=np.float32)
    return float(np.asarray(peer.all_reduce(tensor, op="sum"))[0])


def sum_for_seconds(peer: Peer) -> list[float]:
    """One job that lasts; every rank leaves after the same step."""
    sums = []
    for _ in range(60):
        sums.append(sum_once(peer))
        time.sleep(0.1)
    return sums


def subnet(tmp_path: Path, level: str = "patch", **options: Any) -> UpdatingSubnet:
    return UpdatingSubnet(tmp_path, {"miner-1": level}, environ=QUICK, miners=1, **options)


def following(version: str, major: int = 0, patch: int = 1) -> str:
    """A version after this one."""
    x, y, z = (int(part) for part in version.split("."))
    return f"{x + major}.{y}.{z + patch}"


NEXT = following(__version__)
AFTER = following(__version__, patch=2)
MAJOR = following(__version__, major=1)


def state_of(fleet: UpdatingSubnet) -> dict[str, Any]:
    (file,) = (fleet.checkout / ".releases").glob("miner-*.json")
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_a_good_release_is_taken_once_the_job_has_ended(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        port = fleet.axon(fleet.miner_uids[0])[1]
        results: list[list[float]] = []
        job = threading.Thread(target=lambda: results.extend(fleet.run(sum_for_seconds, 2, 4000)))
        job.start()
        fleet.wait_log("miner-1", "job accepted")
        fleet.origin.release(MAJOR)  # first: so that it is there whenever the other one is found
        fleet.origin.release(NEXT)
        log = fleet.wait_log("miner-1", "updated", 90)
        job.join()
        assert results == [[3.0] * 60] * 2  # what was under way went on to its end
        assert log.index("job ended") < log.index(f"to={NEXT}") < log.rindex(READY)
        assert f"version={NEXT}" in log[log.rindex(READY) :]
        assert "a newer release is not taken" in log
        assert "a major release, and auto_update is patch" in log
        assert fleet.axon(fleet.miner_uids[0])[1] == port
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        assert state_of(fleet)["current"] == NEXT
        assert fleet.installed() == [NEXT]
        assert git(fleet.checkout, "status", "--porcelain") == ""
        assert fleet.miners[0].stop() == 0


def without_updates(fleet: UpdatingSubnet) -> str:
    """What a miner of this checkout writes that starts with auto_update = no, and ends at once:
    its port is taken."""
    place = [
        *("--wallet.name", "miner-1", "--wallet.hotkey", "miner-1"),
        *("--wallet.path", str(fleet.directory / "wallets"), "--netuid", str(NETUID)),
        *("--subtensor.network", fleet.network, "--axon.ip", "127.0.0.1"),
        *("--axon.port", str(fleet.axon(fleet.validator_uid)[1])),
    ]
    done = subprocess.run(
        [sys.executable, str(fleet.checkout / "neurons" / "miner.py"), *place],
        env={**os.environ, "PYTHONPATH": str(fleet.checkout)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    return done.stderr


@pytest.mark.slow
def test_what_ran_last_runs_after_a_restart(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        fleet.origin.release(NEXT)
        fleet.wait_log("miner-1", "updated")
        fleet.miners[0].stop()
        fleet.restart_miner()
        log = fleet.wait_log("miner-1", READY, count=3)
        assert f"version={NEXT}" in log[log.rindex(READY) :]
        # Without updates it is the checkout's own version again, and says so.
        assert f"version {NEXT} ran here before, by auto_update" in without_updates(fleet)
        # An environment that a new system Python has broken: the checkout's own code runs.
        fleet.miners[0].stop()
        python = fleet.checkout / ".releases" / NEXT / "venv" / "bin" / "python"
        python.write_text("#!/bin/sh\nexit 1\n")
        fleet.restart_miner()
        log = fleet.wait_log("miner-1", "this release does not run here any more")
        log = fleet.wait_log("miner-1", "updated", count=2)  # and it is installed once more
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]


MINER, WORKER, CHECK = (
    f"mapreduce/{name}.py" for name in ("services/miner", "services/worker", "selfcheck")
)
START = "    check_subnormals()\n"
TELL = "        self._tell(READY,"
BROKEN = {
    "dies at start": (MINER, START, '    raise LookupError("on purpose")\n'),
    "never ready": (MINER, START, START + "    await asyncio.sleep(3600)\n"),
    "dies after start": (
        WORKER,
        TELL,
        "        asyncio.get_running_loop().call_later(1, os._exit, 3)\n" + TELL,
    ),
}
EXPECTED = {
    "dies at start": "ended with exit code 1",
    "never ready": "was not ready after 8 s",
    "dies after start": "ended with exit code 3, soon after it was ready",
}
NO_CHECK = (CHECK, "    with LocalSubnet(", "    return 0\n    with LocalSubnet(")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=[] if how == "dies after start" else [pytest.mark.slow])
        for how in BROKEN
    ],
)
def test_a_release_that_does_not_serve_is_rolled_back(tmp_path: Path, how: str) -> None:
    with subnet(tmp_path) as fleet:
        commit = fleet.origin.release(NEXT, BROKEN[how], NO_CHECK)
        log = fleet.wait_log("miner-1", "rolled back", 60)
        assert f"version={__version__}" in log[log.rindex(READY) :]
        assert EXPECTED[how] in state_of(fleet)["failed"][commit]
        assert fleet.installed() == []
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        # It is not tried again, and the next one is.
        fleet.origin.release(AFTER)
        log = fleet.wait_log("miner-1", "updated", 60)
        assert log.count(f"to={NEXT}") == 1
        assert state_of(fleet)["current"] == AFTER


def test_a_release_that_is_not_good_is_never_started(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        fleet.origin.release(NEXT, (MINER, "import psutil", "import a_package_that_is_missing"))
        log = fleet.wait_log("miner-1", "a release is not good")
        assert "a_package_that_is_missing" in log
        fleet.origin.release(MAJOR)
        git(fleet.origin.path, "tag", f"v{AFTER}")
        log = fleet.wait_log("miner-1", "a release is not good", count=2)
        assert f"says that it is version {MAJOR}" in log
        assert log.count(READY) == 1
        assert fleet.installed() == []


@pytest.mark.slow
def test_a_state_that_the_new_release_has_converted_is_put_back(tmp_path: Path) -> None:
    schema = "mapreduce/store/schema.py"
    converts = (
        schema,
        "(_VERSION_1, _VERSION_2)",
        '(_VERSION_1, _VERSION_2, ("CREATE TABLE x (y)",))',
    )
    with UpdatingSubnet(tmp_path, {"validator": "patch"}, environ=QUICK, miners=1) as fleet:
        with Database.open_read_only(fleet.state_path):
            pass  # the schema of this version
        fleet.origin.release(NEXT, converts, BROKEN["dies after start"], NO_CHECK)
        log = fleet.wait_log("validator", "rolled back")
        assert EXPECTED["dies after start"] in log
        with Database.open_read_only(fleet.state_path):
            pass
        assert not list(fleet.directory.glob("*-aside*"))
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        # One that converts it and is good keeps it.
        fleet.origin.release(AFTER, converts)
        fleet.wait_log("validator", "updated")
        with pytest.raises(LocalError, match="schema version"):
            Database.open_read_only(fleet.state_path)
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]


@pytest.mark.slow
def test_two_neurons_share_a_checkout(tmp_path: Path) -> None:
    names = {"miner-1": "patch", "miner-2": "patch", "validator": "minor", "bot-1": "major"}
    with UpdatingSubnet(tmp_path, names, environ=QUICK, miners=2, bots=1) as fleet:
        fleet.origin.release(NEXT)
        for name in names:
            fleet.wait_log(name, f"updated version={NEXT}", 90)
        assert fleet.installed() == [NEXT]
        fleet.origin.release(AFTER)
        for name in names:
            fleet.wait_log(name, f"updated version={AFTER}", 90)
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        assert fleet.installed() == [AFTER]


@pytest.mark.slow
def test_an_update_that_cannot_be_written_down_is_put_off(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        fleet.origin.release(NEXT)
        fleet.wait_log("miner-1", "updated")
        (file,) = (fleet.checkout / ".releases").glob("miner-*.json")
        file.with_suffix(".new").mkdir()  # as a full disk would, for root as well
        fleet.origin.release(AFTER)
        fleet.wait_log("miner-1", "no update", count=2)
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        file.with_suffix(".new").rmdir()
        fleet.wait_log("miner-1", f"updated version={AFTER}")


@pytest.mark.slow
def test_two_signals_at_once_are_one(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:  # as systemd sends them to a whole service
        (worker,) = psutil.Process(fleet.miners[0].pid).children()
        worker.terminate()
        fleet.miners[0].send_signal(signal.SIGTERM)
        assert fleet.miners[0].wait(20.0) == 0
        assert "miner is stopping" in fleet.log("miner-1")


@pytest.mark.slow
def test_a_copy_that_an_update_has_left_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    with UpdatingSubnet(tmp_path, {"validator": "patch"}, environ=QUICK, miners=1) as fleet:
        stale = fleet.directory / "validator.sqlite-aside"
        with contextlib.closing(sqlite3.connect(stale)) as connection:
            connection.execute("PRAGMA user_version = 1")
        fleet.origin.release(NEXT, BROKEN["dies after start"], NO_CHECK)
        fleet.wait_log("validator", "rolled back")
        assert not stale.exists()
        fleet.origin.release(AFTER)
        fleet.wait_log("validator", "updated")
        with Database.open_read_only(fleet.state_path):
            pass
        assert not stale.exists()


@pytest.mark.slow
def test_a_state_that_cannot_be_copied_puts_the_update_off(tmp_path: Path) -> None:
    with UpdatingSubnet(tmp_path, {"validator": "patch"}, environ=QUICK, miners=1) as fleet:
        (fleet.directory / "validator.sqlite-aside.new").mkdir()  # as a full disk would
        commit = fleet.origin.release(NEXT)
        log = fleet.wait_log("validator", "rolled back")
        assert "cannot copy the validator's state" in log
        assert f"version={__version__}" in log[log.rindex("validator is ready") :]
        (file,) = (fleet.checkout / ".releases").glob("validator-*.json")
        assert commit not in json.loads(file.read_text())["failed"]
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        supervisor = psutil.Process(fleet.miners[0].pid)
        (worker,) = supervisor.children()
        worker.suspend()  # it cannot stop in order
        fleet.miners[0].send_signal(signal.SIGTERM)
        assert fleet.miners[0].wait(1.0) is None
        fleet.miners[0].send_signal(signal.SIGTERM)
        assert fleet.miners[0].wait(5.0) == 128 + signal.SIGKILL
        assert not worker.is_running()


@pytest.mark.slow
def test_a_neuron_that_ends_by_itself_ends_its_supervisor(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        (worker,) = psutil.Process(fleet.miners[0].pid).children()
        worker.kill()
        assert fleet.miners[0].wait(10.0) == 128 + signal.SIGKILL
        fleet.restart_miner()
        fleet.wait_log("miner-1", READY, count=2)
        (worker,) = psutil.Process(fleet.miners[0].pid).children()
        fleet.miners[0].kill()
        for _ in range(100):  # and it does not outlive its supervisor
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the worker runs on")


@pytest.mark.slow
def test_only_told_of_with_notify_and_nothing_in_a_changed_tree(tmp_path: Path) -> None:
    with subnet(tmp_path, "notify") as fleet:
        fleet.origin.release(NEXT)
        fleet.origin.release(MAJOR)
        log = fleet.wait_log("miner-1", "a newer release")
        assert f"version=v{MAJOR}" in log
        time.sleep(2)  # some more looks
        assert fleet.log("miner-1").count("a newer release") == 1
        assert not (fleet.checkout / ".releases").exists() or fleet.installed() == []
    other = tmp_path / "other"
    other.mkdir()
    with subnet(other) as fleet:
        (fleet.checkout / "README.md").write_text("mine")
        fleet.origin.release(NEXT)
        log = fleet.wait_log("miner-1", "changes that are not committed")
        assert "README.md" in log
        git(fleet.checkout, "checkout", "README.md")
        fleet.wait_log("miner-1", "updated")


@pytest.mark.slow
def test_a_repository_that_does_not_answer_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with subnet(tmp_path) as fleet:
        hidden = fleet.origin.path.rename(tmp_path / "hidden")
        fleet.wait_log("miner-1", "no update", count=2)
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
        hidden.rename(fleet.origin.path)
        fleet.origin.release(NEXT)
        fleet.wait_log("miner-1", "updated")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_an_update_may_be_interrupted(tmp_path: Path, number: int) -> None:
    with UpdatingSubnet(
        tmp_path, {"miner-1": "patch"}, environ={"TRY_PROBATION_S": "60"}, miners=1
    ) as fleet:
        fleet.origin.release(NEXT)
        fleet.wait_log("miner-1", READY, count=2)
        fleet.miners[0].send_signal(number)
        assert fleet.miners[0].wait(20) == 0
        assert state_of(fleet)["trying"] == NEXT
        fleet.restart_miner()
        fleet.wait_log("miner-1", "an update was interrupted")
        fleet.wait_log("miner-1", f"to={NEXT}", count=2)  # it is tried once more
        fleet.wait_log("miner-1", READY, count=3)


def test_with_pip_into_an_environment_of_its_own(tmp_path: Path) -> None:
    with UpdatingSubnet(tmp_path, {"miner-1": "minor"}, fast=False, miners=1) as fleet:
        fleet.origin.release(NEXT)
        log = fleet.wait_log("miner-1", READY, 110, count=2)
        assert f"version={NEXT}" in log[log.rindex(READY) :]
        assert fleet.run(sum_once, 2, 4000) == [3.0, 3.0]
