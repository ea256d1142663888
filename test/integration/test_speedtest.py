"""A miner runs the public speed test tool, as it is, against a Mini server on loopback."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from mapreduce.errors import Refused, Unavailable
from mapreduce.net.auth import Verifier, new_session_key
from mapreduce.net.listener import listen
from mapreduce.net.server import make_app, start_server
from mapreduce.processes import free_port
from mapreduce.services.grants import MAX_GRANT_AHEAD_S
from mapreduce.services.miner import Miner
from mapreduce.services.speedtest import NOT_INSTALLED, SpeedTests, run_tool, tool_command
from mapreduce.speedtest import ask, wait_for_end
from mapreduce.wire.speedtest import EVERY_S, MAX_OUTPUT_BYTES, RETRY_S, SpeedTestAnswer
from test.integration.fleet import Fleet, MinerNode, in_loop, new_hotkey, until
from test.integration.test_processes import is_gone
from test.speedtest_mini import IP, SpeedtestMini

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from bittensor.sp_core import Keypair

ROOT = Path(__file__).resolve().parents[2]
STATUS = ("GET", "/v1/status")
GET = ("GET", "/v1/speedtest")
POST = ("POST", "/v1/speedtest")
# Starts a process of its own in the same group, which holds its pipes, and says which.
WITH_CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
part = pathlib.Path(sys.argv[1] + ".part")
part.write_text(str(child.pid))
part.rename(sys.argv[1])
"""


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpeedtestMini]:
    with SpeedtestMini() as mini:
        for name, value in mini.environment.items():
            monkeypatch.setenv(name, value)
        yield mini


class Asked:
    """A fleet, and a miner of it that runs speed tests."""

    def __init__(self, fleet: Fleet, node: MinerNode, tests: SpeedTests) -> None:
        self.fleet = fleet
        self.node = node
        self.tests = tests

    async def ask(self, *, start: bool) -> SpeedTestAnswer:
        fleet = self.fleet
        return await ask(fleet.http, fleet.validator_key, self.node.remote, start=start)

    async def end(self) -> SpeedTestAnswer:
        """What the test that runs ends with."""
        await until(lambda: self.tests.last.state != "running", "the test has ended", 15.0)
        return await self.ask(start=False)

    async def test(self) -> SpeedTestAnswer:
        await self.ask(start=True)
        return await self.end()

    async def status(self, key: Keypair | None = None) -> int:
        request = self.fleet.request(key or self.fleet.validator_key, self.node.remote, *STATUS)
        return (await request)[0]


@asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[Asked]:
    """`options` are those of SpeedTests."""
    async with Fleet(miners=0) as fleet:
        key = new_hotkey()
        miner = Miner(
            key,
            fleet.directory,
            max_jobs=8,
            memory_limit_bytes=1 << 30,
            started_at=time.time() - MAX_GRANT_AHEAD_S,
        )
        tests = SpeedTests(miner._require_validator, lambda: len(miner.jobs), **options)
        app = make_app(Verifier(key.ss58_address), lambda: None)
        miner.add_routes(app)
        tests.add_routes(app)
        runner = await start_server(app, listen(IP, 0))
        port = runner.addresses[0][1]
        uid = fleet.directory.add(key.ss58_address, port)
        fleet.miners.append(MinerNode(key, uid, miner, runner, port))
        yield Asked(fleet, fleet.miners[0], tests)


def tools(pid: int | None = None) -> list[psutil.Process]:
    """The tool's processes below this one, or another."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "speedtest" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


# A test -----------------------------------------------------------------------------------------


@in_loop
async def test_a_validator_gets_figures_time_and_server_and_no_second_test_in_six_hours(
    mini: SpeedtestMini, capsys: pytest.CaptureFixture[str]
) -> None:
    async with asking(mini=mini.url) as t:
        assert (await t.ask(start=False)).state == "never"
        assert mini.requests == []
        began = time.time()
        running = await t.ask(start=True)
        assert (running.state, running.next_at) == ("running", None)
        key, miner = t.fleet.validator_key, t.node.remote
        answer = await wait_for_end(t.fleet.http, key, miner, running)

        assert answer.state == "done", answer.reason
        assert answer.at == running.at
        assert answer.at is not None
        assert began <= answer.at <= time.time()
        assert answer.next_at == answer.at + EVERY_S
        assert answer.download_bits_per_s is not None
        assert answer.upload_bits_per_s is not None
        assert answer.ping_s is not None
        assert min(answer.download_bits_per_s, answer.upload_bits_per_s, answer.ping_s) > 0
        assert answer.server is not None
        assert (answer.server.name, answer.server.sponsor) == (mini.address, "Speedtest Mini")
        assert {"config", "page", "latency", "download", "upload"} == set(mini.requests)
        assert "is testing: 0 s" in capsys.readouterr().err

        asked = len(mini.requests)
        for start in (True, False):
            assert await t.ask(start=start) == answer
        assert len(mini.requests) == asked
        assert not tools()

        t.tests.last = replace(answer, at=answer.at - EVERY_S, next_at=answer.next_at - EVERY_S)
        again = await t.test()
        assert (again.state, again.at) != (answer.state, answer.at)
        assert len(mini.requests) > asked


@in_loop
async def test_only_a_hotkey_with_a_permit_may_ask(mini: SpeedtestMini) -> None:
    async with asking(mini=mini.url) as t:
        keys = (new_hotkey(), new_session_key(), t.node.key)
        for key in keys:
            for request in (GET, POST):
                refusal = await t.fleet.refusal(key, t.node.remote, *request)
                assert refusal[:2] == (403, "no_permit")
        assert (await t.fleet.refusal(None, t.node.remote, *POST))[0] == 401
        assert t.tests.last.state == "never"
        assert mini.requests == []


@in_loop
async def test_while_it_runs_the_miner_serves_and_nobody_starts_another(
    mini: SpeedtestMini,
) -> None:
    mini.hold = "page"
    async with asking(mini=mini.url) as t:
        running = await t.ask(start=True)
        await until(lambda: "page" in mini.requests, "the tool asked for the page")
        assert len(tools()) == 1
        for start in (True, False):
            assert await t.ask(start=start) == running
        assert await t.status() == 200
        job, _ = await t.fleet.offer()  # a test is no reason to refuse a job
        assert list(t.node.miner.jobs) == [job]
        mini.release()
        assert (await t.end()).state == "done"
        assert mini.requests.count("page") == 1


@in_loop
async def test_jobs_that_run_are_not_harmed(mini: SpeedtestMini) -> None:
    async with asking(mini=mini.url) as t:
        jobs = []
        for count, text in ((1, "1 job running"), (2, "2 jobs running")):
            jobs.append((await t.fleet.offer())[0])
            status, code, message = await t.fleet.refusal(
                t.fleet.validator_key, t.node.remote, *POST
            )
            assert (status, code, count) == (409, "busy", len(jobs))
            assert text in message
        assert (await t.ask(start=False)).state == "never"
        for job in jobs:
            await t.fleet.request(t.fleet.validator_key, t.node.remote, "DELETE", f"/v1/jobs/{job}")
        assert (await t.test()).state == "done"
        await t.fleet.offer()
        assert (await t.ask(start=True)).state == "done"  # the last one is told in any case


@in_loop
async def test_the_end_of_the_miner_ends_the_test(mini: SpeedtestMini) -> None:
    mini.hold = "download"
    async with asking(mini=mini.url) as t:
        await t.ask(start=True)
        await until(lambda: "download" in mini.requests, "the tool is at work")
        (tool,) = tools()
        await t.node.runner.cleanup()
        assert is_gone(tool.pid)
        assert not tools()


# No test ----------------------------------------------------------------------------------------


@in_loop
async def test_a_server_that_is_down_is_a_reason_and_the_miner_serves(
    mini: SpeedtestMini, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://user:secret@{IP}:{free_port()}/mini"
    async with asking(mini=url) as t:
        answer = await t.test()
        assert answer.state == "failed"
        assert answer.reason == "speedtest-cli failed: ERROR: Failed to connect to .."
        assert answer.at is not None
        assert answer.next_at == answer.at + RETRY_S
        (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "the miner runs on" in warning.getMessage()
        assert f"..@{IP}" in warning.reason  # type: ignore[attr-defined]
        assert "secret" not in caplog.text + str(vars(warning))
        assert await t.status() == 200

        asked = len(mini.requests)
        assert await t.ask(start=True) == answer
        assert len(mini.requests) == asked
        t.tests.last = replace(answer, at=answer.at - RETRY_S, next_at=answer.at)
        assert (await t.test()).at != answer.at


@in_loop
async def test_no_network_at_all_is_a_reason_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{IP}:{free_port()}")
    for mini in (None, f"http://{IP}:{free_port()}"):
        async with asking(mini=mini) as t:
            answer = await t.test()
            assert answer.state == "failed"
            assert "Connection refused" in answer.reason


@in_loop
async def test_an_error_of_ours_ends_the_test_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with asking(mini="http://\0") as t:  # no process can be started with such an argument
        answer = await t.test()
        assert (answer.state, answer.reason) == (
            "failed",
            "an error of the miner; its log has more",
        )
        assert "null byte" in caplog.text
        assert await t.status() == 200


@in_loop
async def test_a_miner_that_allows_none_says_so(mini: SpeedtestMini) -> None:
    async with asking(mini=mini.url, enabled=False) as t:
        for request in (GET, POST):
            refusal = await t.fleet.refusal(t.fleet.validator_key, t.node.remote, *request)
            assert refusal == (
                409,
                "disabled",
                "this miner runs no speed tests (--miner.no_speedtest)",
            )
        assert (await t.fleet.refusal(new_hotkey(), t.node.remote, *POST))[0] == 403
        assert mini.requests == []


@in_loop
async def test_a_missing_tool_is_told_at_the_start_and_to_who_asks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with asking(module="speedtest_of_nobody") as t:
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warning.startswith(NOT_INSTALLED)
        assert "pip install speedtest-cli; the miner runs on" in warning
        answer = await t.ask(start=True)
        assert answer.state == "failed"
        assert NOT_INSTALLED in answer.reason
        assert await t.status() == 200


@in_loop
async def test_no_warning_of_a_missing_tool_where_none_is_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with asking(module="speedtest_of_nobody", enabled=False):
        assert not [r for r in caplog.records if r.levelno == logging.WARNING]


@in_loop
async def test_a_neuron_that_knows_no_speed_tests_is_told_apart() -> None:
    async with Fleet(miners=1) as fleet:
        with pytest.raises(Refused, match="knows no speed tests"):
            await ask(fleet.http, fleet.validator_key, fleet.miners[0].remote, start=True)


# The tool's process -----------------------------------------------------------------------------


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


@in_loop
async def test_what_the_tool_prints_comes_back() -> None:
    assert await run_tool(python("print('{}')")) == b"{}\n"
    code = f"print('x' * ({MAX_OUTPUT_BYTES} - 1))"
    assert len(await run_tool(python(code))) == MAX_OUTPUT_BYTES


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"print('x' * {MAX_OUTPUT_BYTES})", f"printed more than {MAX_OUTPUT_BYTES} bytes"),
        ("print('x' * 50_000_000)", f"printed more than {MAX_OUTPUT_BYTES} bytes"),
        ("import sys; sys.exit('no\\nservers found\\n\\n')", "failed: servers found$"),
        ("import sys; sys.exit('x' * 100_000)", "failed: x+$"),
        ("import sys; sys.exit(3)", "failed: exit code 3"),
        ("import os; os.abort()", "failed: exit code -6"),
        ("import os; os.write(2, b'\\xff\\xfe'); os._exit(1)", "failed: "),
    ],
)
@in_loop
async def test_a_tool_that_fails_says_why(code: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        await run_tool(python(code))


@in_loop
async def test_a_command_that_does_not_exist_says_so() -> None:
    with pytest.raises(Unavailable, match=r"cannot run /nowhere/tool: No such file"):
        await run_tool(["/nowhere/tool"])


@pytest.mark.parametrize("ends", ["time.sleep(60)", "pass"])
@in_loop
async def test_a_tool_that_takes_too_long_is_killed_with_what_it_started(
    tmp_path: Path, ends: str
) -> None:
    told = tmp_path / "pid"
    task = asyncio.create_task(run_tool(python(WITH_CHILD + ends, str(told)), timeout_s=1.5))
    await until(told.exists, "the tool has started a process", 1.5)
    pid = int(told.read_text())
    assert not is_gone(pid)
    with pytest.raises(Unavailable, match=r"not done after 1\.5 s"):
        await task
    await until(lambda: is_gone(pid), "what it started is gone")


@in_loop
async def test_a_tool_that_is_given_up_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    task = asyncio.create_task(run_tool(python(WITH_CHILD + "time.sleep(60)", str(told))))
    await until(told.exists, "the tool has started a process")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await until(lambda: is_gone(int(told.read_text())), "what it started is gone")


def test_no_module_of_ours_is_taken_for_the_tool() -> None:
    for directory in (ROOT, ROOT / "mapreduce", ROOT / "mapreduce" / "services"):
        command = [*tool_command(None), "--version"]
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stdout.startswith("speedtest-cli 2.")
