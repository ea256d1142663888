"""Validators' operators and miners, each a real process, and the speed test between them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mapreduce.local import NETUID, LocalSubnet, Place
from mapreduce.local_chain import WALLETS
from mapreduce.net.client import Remote, make_http_session
from mapreduce.processes import free_port
from mapreduce.services.speedtest import NOT_INSTALLED
from mapreduce.speedtest import ask
from test.integration.test_processes import eventually, is_gone
from test.integration.test_speedtest import tools
from test.speedtest_mini import IP, SpeedtestMini

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mapreduce.wire.speedtest import SpeedTestAnswer


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpeedtestMini]:
    with SpeedtestMini() as mini:
        for name, value in mini.environment.items():
            monkeypatch.setenv(name, value)
        yield mini


class Subnet(LocalSubnet):
    """The third miner allows no speed tests."""

    def place(self, name: str) -> Place:
        place = super().place(name)
        return replace(place, flags=("--miner.no_speedtest",)) if name == "miner-3" else place


def run_cli(subnet: LocalSubnet, hotkey: str, uid: int, *flags: str) -> Any:
    command = [
        *(sys.executable, "-m", "mapreduce.speedtest", "--miner.uid", str(uid)),
        *("--subtensor.network", subnet.network, "--netuid", str(NETUID)),
        *("--wallet.path", str(subnet.directory / WALLETS), "--wallet.name", "local"),
        *("--wallet.hotkey", hotkey, *flags),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def ask_now(subnet: LocalSubnet, uid: int, *, start: bool) -> SpeedTestAnswer:
    neuron = subnet.metagraph().by_uid(uid)
    assert neuron is not None
    assert neuron.ip is not None
    assert neuron.port is not None
    remote = Remote(f"miner uid {uid}", neuron.hotkey, neuron.ip, neuron.port)

    async def run() -> SpeedTestAnswer:
        async with make_http_session() as http:
            return await ask(http, subnet.wallet("validator").hotkey, remote, start=start)

    return asyncio.run(run())


@pytest.mark.slow
def test_a_validators_operator_tests_miners_that_run(mini: SpeedtestMini) -> None:
    flags = ("--miner.speedtest_mini", mini.url)
    with Subnet(miners=3, miner_flags=flags) as subnet:
        first, second, third = subnet.miner_uids

        never = run_cli(subnet, "validator", first, "--show")
        assert never.returncode == 0, never.stderr
        assert "speed test never" in never.stdout
        done = run_cli(subnet, "validator", first)
        assert done.returncode == 0, done.stderr
        assert "is testing: 0 s" in done.stderr
        assert f"server     {mini.address}, Speedtest Mini" in done.stdout
        assert "no weight in any score" in done.stdout
        asked = len(mini.requests)
        told = []
        for flag in ("--json", "--show"):
            again = run_cli(subnet, "validator", first, "--json", flag)
            assert again.returncode == 0, again.stderr
            told.append(json.loads(again.stdout)["speedtest"])
        assert "this is the last one" in run_cli(subnet, "validator", first).stderr
        assert told[0] == told[1]
        assert told[0]["state"] == "done"
        assert len(mini.requests) == asked
        assert "speed test done" in subnet.miners[0].log_path.read_text()

        for hotkey, uid, code, error in (
            ("peer", first, 1, "holds no validator permit"),
            ("validator", third, 1, "runs no speed tests (--miner.no_speedtest)"),
            ("validator", subnet.validator_uid, 1, "knows no speed tests"),
            ("validator", 250, 2, "miner_uid = 250: netuid"),
        ):
            refused = run_cli(subnet, hotkey, uid)
            assert (refused.returncode, refused.stdout) == (code, "")
            assert error in refused.stderr

        # While it runs the miner is ready; SIGTERM ends both, and SIGKILL too.
        mini.hold = "page"
        assert ask_now(subnet, second, start=True).state == "running"
        child = subnet.miners[1]
        assert eventually(lambda: mini.requests[-1] == "page")
        (tool,) = tools(child.pid)
        assert subnet._answers(second)
        assert child.stop() == 0
        assert is_gone(tool.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a SIGKILL")
def test_a_tool_dies_with_a_miner_that_is_killed(mini: SpeedtestMini) -> None:
    mini.hold = "page"
    with LocalSubnet(miners=1, miner_flags=("--miner.speedtest_mini", mini.url)) as subnet:
        (uid,) = subnet.miner_uids
        assert ask_now(subnet, uid, start=True).state == "running"
        assert eventually(lambda: mini.requests[-1:] == ["page"])
        (tool,) = tools(subnet.miners[0].pid)
        os.kill(subnet.miners[0].pid, signal.SIGKILL)
        assert eventually(lambda: is_gone(tool.pid))


def test_a_miner_with_a_server_that_is_down_runs_on(mini: SpeedtestMini) -> None:
    flags = ("--miner.speedtest_mini", f"http://{IP}:{free_port()}")
    with LocalSubnet(miners=1, miner_flags=flags) as subnet:
        (uid,) = subnet.miner_uids
        failed = run_cli(subnet, "validator", uid)
        assert failed.returncode == 1, failed.stderr
        assert "speed test failed, begun" in failed.stdout
        assert "ERROR: Failed to connect to .." in failed.stdout
        assert subnet._answers(uid)
        assert "no speed test; the miner runs on" in subnet.miners[0].log_path.read_text()


# As if the operator had never installed it: nothing in the process, or below it, finds it.
WITHOUT_TOOL = """
import sys

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "speedtest":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
"""


def test_a_miner_without_the_tool_says_so_once_and_runs_on(
    mini: SpeedtestMini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TOOL)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
    with LocalSubnet(miners=1, miner_flags=("--miner.speedtest_mini", mini.url)) as subnet:
        (uid,) = subnet.miner_uids
        assert subnet.miners[0].log_path.read_text().count(NOT_INSTALLED) == 1
        answer = ask_now(subnet, uid, start=True)
        assert answer.state == "failed"
        assert NOT_INSTALLED in answer.reason
        assert subnet._answers(uid)
        assert mini.requests == []
