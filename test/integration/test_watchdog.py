"""Neurons that see no blocks any more end by themselves: real processes, and clocks that stop."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mapreduce.config import EXIT_STALLED
from mapreduce.core.block_watch import LEAST_S
from mapreduce.local import LocalSubnet
from mapreduce.services.watchdog import GRACE_S
from mapreduce.store.database import Database
from mapreduce.store.history import History

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mapreduce.processes import ChildProcess
    from peer import Peer

SHORT_S = 2.0
WINDOWS = ("--scoring.window_s", "20", "--benchmark.seconds", "1")


class StoppableSubnet(LocalSubnet):
    """A validator and a miner whose chain and loops can be stopped, by `stop_short`."""

    def __init__(self, directory: Path, least_s: float = SHORT_S, **options: Any) -> None:
        self._least_s = least_s
        super().__init__(miners=1, directory=directory, **options)

    def program(self, role: str, name: str) -> tuple[str, ...]:
        """What Python runs as this neuron."""
        if role == "benchmark":
            return super().program(role, name)
        place = self.directory / f"faults of {name}"
        place.mkdir(exist_ok=True)
        return ("-m", "test.faults.stopped", str(place), str(self._least_s), role)

    def start_miner(self) -> ChildProcess:
        """Starts the miner again, at a new port."""
        return self._serving("miner", "miner-1", ())

    def stop_short(self, name: str, how: str) -> None:
        """Lets it happen."""
        (self.directory / f"faults of {name}" / how).touch()

    def go_on(self, name: str) -> None:
        """Takes everything back."""
        for fault in (self.directory / f"faults of {name}").iterdir():
            fault.unlink()


def sum_once(peer: Peer) -> float:
    tensor = np.full(1000, float(peer.rank), dtype=np.float32)
    return float(np.asarray(peer.all_reduce(tensor, op="sum"))[0])


def ended(child: ChildProcess | None, timeout_s: float) -> Sequence[str]:
    """The last lines of a neuron that ends with the code for a silent chain."""
    assert child is not None
    assert child.wait(timeout_s) == EXIT_STALLED
    return child.last_lines()


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_a_chain_that_stands_still_ends_the_neuron(tmp_path: Path, role: str) -> None:
    with StoppableSubnet(tmp_path) as subnet:
        child, name = (
            (subnet.miners[0], "miner-1") if role == "miner" else (subnet.validator, "validator")
        )
        subnet.stop_short(name, "frozen")
        lines = ended(child, SHORT_S + GRACE_S + 10)
        assert lines[-1].startswith("error: the chain has shown no block after ")
        assert lines[-1].endswith("3 new connections did not help")
        assert sum("connecting anew" in line for line in lines) == 3
        assert any(f"{role} is stopping" in line for line in lines)


def test_a_blocked_loop_ends_all_the_same_and_says_where(tmp_path: Path) -> None:
    with StoppableSubnet(tmp_path) as subnet:
        subnet.stop_short("miner-1", "blocked")
        (line,) = [
            line
            for line in ended(subnet.miners[0], SHORT_S + GRACE_S + 10)
            if line.startswith("error:")
        ]
        assert "the event loop has been blocked for " in line
        assert "in block_once_told (" in line
        assert "stopped.py:" in line
        assert line == subnet.miners[0].last_lines()[-1]


def test_a_neuron_that_hangs_while_it_stops_is_ended_by_force(tmp_path: Path) -> None:
    with StoppableSubnet(tmp_path) as subnet:
        subnet.stop_short("miner-1", "hung")
        subnet.stop_short("miner-1", "frozen")
        line = ended(subnet.miners[0], SHORT_S + GRACE_S + 10)[-1]
        assert line.endswith("it did not stop within 2 s and is ended by force")


def test_a_chain_file_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with StoppableSubnet(tmp_path) as subnet:
        chain = tmp_path / "chain.sqlite"
        hidden = chain.rename(tmp_path / "hidden")
        lines = ended(subnet.miners[0], SHORT_S + GRACE_S + 10)
        assert not chain.exists()
        assert "was removed or replaced; restart this process" in lines[-1]
        hidden.rename(chain)


def test_a_process_that_was_suspended_is_given_its_time(tmp_path: Path) -> None:
    with StoppableSubnet(tmp_path, least_s=5.0) as subnet:
        miner = subnet.miners[0]
        os.kill(miner.pid, signal.SIGSTOP)
        time.sleep(6)  # longer than the limit
        os.kill(miner.pid, signal.SIGCONT)
        assert miner.wait(4) is None
        assert subnet.run(sum_once, 2, 4000) == [3.0, 3.0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_within_two_minutes_and_the_state_goes_on(tmp_path: Path) -> None:
    """The real bound: a validator that scores, its chain frozen; then it is started again."""
    options = {
        "bots": 2,
        "validator_flags": ("--scoring.window_s", "20", "--benchmark.seconds", "1"),
    }
    with StoppableSubnet(tmp_path, least_s=LEAST_S, **options) as subnet:
        wait_for_windows(subnet.state_path, 2)
        # Both: on an embedded chain each process that writes moves it on for all.
        subnet.stop_short("validator", "frozen")
        subnet.stop_short("miner-1", "frozen")
        frozen_at = time.monotonic()
        line = ended(subnet.validator, LEAST_S + GRACE_S + 10)[-1]
        took_s = time.monotonic() - frozen_at
        ended(subnet.miners[0], GRACE_S + 10)
        assert LEAST_S < took_s < LEAST_S + GRACE_S + 10
        print(f"\nfrom the last block to the exit: {took_s:.1f} s; {line}")
        before = windows(subnet.state_path)
        subnet.go_on("validator")
        subnet.go_on("miner-1")
        subnet.restart_validator()
        subnet.miners[0] = subnet.start_miner()
        wait_for_windows(subnet.state_path, before + 2)
        with Database.open_read_only(subnet.state_path) as database:
            assert database.execute("PRAGMA integrity_check") == [("ok",)]
            assert len(History(database).leaderboard()) == 1
        assert subnet.run(sum_once, 2, 4000) == [3.0, 3.0]


def windows(state: Path) -> int:
    """How many windows are closed."""
    with Database.open_read_only(state) as database:
        ((count,),) = database.execute("SELECT COUNT(*) FROM windows")
        return int(count)


def wait_for_windows(state: Path, count: int, timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while windows(state) < count:
        assert time.monotonic() < deadline
        time.sleep(0.5)
