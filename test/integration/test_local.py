"""What a newcomer starts: LocalSubnet, the smoke test, the examples, the demo, the neurons."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from mapreduce.errors import CollectiveMismatch, InvalidArgument, JobClosed, PeerLost
from mapreduce.local import LocalSubnet
from mapreduce.processes import ProcessDied
from mapreduce.ranks import RankFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peer import Peer

ROOT = Path(__file__).resolve().parents[2]
CLEAN_ENV = {key: value for key, value in os.environ.items() if not key.startswith("BT_")}


@pytest.fixture(scope="module")
def subnet() -> Iterator[LocalSubnet]:
    with LocalSubnet(miners=2) as subnet:
        yield subnet


def sum_of_ranks(peer: Peer) -> float:
    import torch

    return float(peer.all_reduce(torch.full((10,), float(peer.rank)), op="sum")[0])


def disagree(peer: Peer) -> None:
    import torch

    peer.all_reduce(torch.zeros(10 + peer.rank))


def die(peer: Peer) -> None:
    if peer.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_of_ranks(peer)


def flags(subnet: LocalSubnet, hotkey: str = "peer") -> list[str]:
    return [
        *("--subtensor.network", subnet.network),
        *("--wallet.name", hotkey if hotkey.startswith("miner-") else "local"),
        *("--wallet.hotkey", hotkey),
        *("--wallet.path", str(subnet.directory / "wallets")),
    ]


def python(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=CLEAN_ENV,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **options,  # type: ignore[call-overload]
    )


# LocalSubnet --------------------------------------------------------------------------------------


def test_run_gives_each_rank_a_process_and_returns_in_rank_order(subnet: LocalSubnet) -> None:
    assert subnet.run(sum_of_ranks, 3) == [6.0, 6.0, 6.0]


def test_what_a_rank_raises_is_raised_here_with_its_attributes(subnet: LocalSubnet) -> None:
    with pytest.raises(CollectiveMismatch) as caught:
        subnet.run(disagree, 2)
    assert caught.value.differences == {"shape": {1: "(11,)", 2: "(12,)"}}


def test_a_rank_that_dies_is_reported(subnet: LocalSubnet) -> None:
    with pytest.raises((RankFailed, PeerLost)) as caught:
        subnet.run(die, 2)
    assert "rank 2" in str(caught.value)


def test_a_subnet_that_cannot_start_says_why_and_leaves_nothing() -> None:
    subnet = LocalSubnet(miners=1, miner_flags=["--axon.port", "none"])
    with pytest.raises(ProcessDied) as caught:
        subnet.start()
    assert "miner-1" in str(caught.value)
    assert "axon.port" in str(caught.value)
    with pytest.raises(JobClosed):
        _ = subnet.directory
    with pytest.raises(InvalidArgument):
        LocalSubnet(miners=-1)


class IdleBots(LocalSubnet):
    """A subnet whose bots only write down how they were started."""

    def program(self, role: str, name: str) -> tuple[str, ...]:
        if role != "benchmark":
            return super().program(role, name)
        return ("-c", "import sys, time; print(*sys.argv[1:], flush=True); time.sleep(600)")


def test_bots_are_unregistered_hotkeys_that_their_validator_knows() -> None:
    with IdleBots(miners=1, bots=2, bot_flags=["--logging.debug"]) as subnet:
        bots = [subnet.wallet(f"bot-{number}").hotkey.ss58_address for number in (1, 2)]
        metagraph = subnet.metagraph()
        assert not any(metagraph.by_hotkey(bot) for bot in bots)
        assert subnet.validator is not None
        command = psutil.Process(subnet.validator.pid).cmdline()
        assert command[command.index("--benchmark_hotkeys") + 1] == ",".join(bots)
        subnet.bots[1].wait_ready(lambda: bool(subnet.bots[1].last_lines()))
        (line,) = subnet.bots[1].last_lines()
        uid = f"--validator.uid {subnet.validator_uid}"
        assert line.endswith(f"--wallet.path {subnet.directory / 'wallets'} {uid} --logging.debug")
        assert "--wallet.name local --wallet.hotkey bot-2" in line
        os.kill(subnet.bots[0].pid, signal.SIGKILL)
        assert subnet.bots[0].wait(5.0) is not None
        with pytest.raises(ProcessDied, match="bot-1"):
            subnet.check()
    assert subnet.bots == []


def test_a_strict_subnet_serves_jobs_through_limited_links_of_miners_with_owners() -> None:
    limits = {"miner-1": 100e6, "miner-2": 50e6}
    with LocalSubnet(2, strict=True, tempo=10, limits=limits) as subnet:
        metagraph = subnet.metagraph()
        validator = metagraph.by_uid(subnet.validator_uid)
        assert validator is not None
        assert validator.validator_permit
        miners = [metagraph.neurons[uid] for uid in subnet.miner_uids]
        assert {miner.ip for miner in miners} == {"127.0.0.2"}
        assert len({miner.coldkey for miner in (validator, *miners)}) == 3
        assert subnet.wallet("miner-1").hotkey.ss58_address == miners[0].hotkey
        for number, miner in enumerate(miners, 1):  # what is published is the link's port
            link = subnet.directory / f"miner-{number}.link.log"
            assert link.read_text() == f"ready {miner.port}\n"
        assert subnet.run(sum_of_ranks, 2) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bots": -1}, "bots = -1"),
        ({"limits": {"miner-2": 1e6}}, "there is no 'miner-2'"),
        ({"limits": {"peer-1": 1e6}}, "there is no 'peer-1'"),
        ({"limits": {"miner-1": 0.0}}, "miner-1: 0.0 is no rate"),
        ({"limits": {"miner-1": float("nan")}}, "is no rate"),
    ],
)
def test_what_a_subnet_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        LocalSubnet(1, **options)


def test_a_neuron_that_dies_later_is_reported_with_its_last_lines() -> None:
    with LocalSubnet(miners=1) as subnet:
        subnet.check()
        os.kill(subnet.miners[0].pid, signal.SIGKILL)
        assert subnet.miners[0].wait(5.0) is not None
        with pytest.raises(ProcessDied) as caught:
            subnet.check()
        assert "miner is ready" in str(caught.value)


def test_children_die_with_a_parent_that_is_killed() -> None:
    script = (
        "import time\n"
        "from mapreduce.local import LocalSubnet\n"
        "if __name__ == '__main__':\n"
        "    subnet = LocalSubnet(miners=1)\n"
        "    subnet.start()\n"
        "    print(subnet.validator.pid, subnet.miners[0].pid, subnet.directory, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=CLEAN_ENV, cwd=ROOT
    )
    assert parent.stdout is not None
    validator, miner, directory = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(
        [psutil.Process(int(pid)) for pid in (validator, miner) if psutil.pid_exists(int(pid))], 5
    )
    assert not alive, gone
    subprocess.run(["rm", "-rf", directory], check=True)


def test_ctrl_c_ends_the_ranks_and_the_subnet_without_noise(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, time\n"
        "from mapreduce.local import LocalSubnet\n"
        "def fn(peer):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        with LocalSubnet(miners=1) as subnet:\n"
        "            subnet.run(fn, 1)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN_ENV,
        start_new_session=True,
    )
    assert parent.stdout is not None
    rank = int(parent.stdout.readline())
    neurons = psutil.Process(parent.pid).children(recursive=True)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, errors = parent.communicate(timeout=30)
    assert (output, errors) == ("interrupted\n", "")
    assert not psutil.pid_exists(rank)
    assert not psutil.wait_procs(neurons, 5)[1]


@pytest.mark.slow
def test_works_from_a_plain_install(tmp_path: Path) -> None:
    """A user's test, in a directory of its own, against the built package."""
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    done = python(*install, str(site), str(ROOT))
    assert done.returncode == 0, done.stderr
    script = tmp_path / "users_test.py"
    script.write_text(
        "from mapreduce.local import LocalSubnet\n"
        "import mapreduce, torch\n"
        "def fn(peer):\n"
        "    return float(peer.all_reduce(torch.ones(3) * peer.rank)[0])\n"
        "if __name__ == '__main__':\n"
        "    with LocalSubnet(miners=1) as subnet:\n"
        "        print(mapreduce.__file__, subnet.run(fn, 2))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=CLEAN_ENV | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split()[0].startswith(str(site)), done.stderr
    assert "[1.5, 1.5]" in done.stdout


# What users run -----------------------------------------------------------------------------------


def test_the_smoke_test_of_the_seed(subnet: LocalSubnet) -> None:
    uid = str(subnet.validator_uid)
    done = python("test/test.py", *flags(subnet), "--validator.uid", uid, "--size", "1000000")
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout
    assert len(re.findall(r"exact$", done.stdout, re.MULTILINE)) == 6


def test_the_smoke_test_names_a_wrong_validator(subnet: LocalSubnet) -> None:
    done = python("test/test.py", *flags(subnet), "--validator.uid", "77")
    assert done.returncode == 2
    assert "no such uid" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_user_guides_script(subnet: LocalSubnet) -> None:
    uid = ["--validator.uid", str(subnet.validator_uid)]
    argv = [sys.executable, "examples/train.py", *flags(subnet), *uid, "--count", "2"]
    ranks = [
        subprocess.Popen(
            [*argv, "--rank", str(rank)],
            cwd=ROOT,
            env=CLEAN_ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (1, 2)
    ]
    for rank, process in enumerate(ranks, 1):
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
        assert f"Peer {rank} has finished training." in output


def test_the_readme_shows_the_user_guides_script_whole() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- examples/train\.py -->\s*```python\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == (ROOT / "examples" / "train.py").read_text()


def test_the_demo_passes_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    size = ["--peers", "2", "--miners", "2", "--bytes", "8000000"]
    done = python("-m", "mapreduce.demo", *size, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 2
    outcome = json.loads(path.read_text())
    assert outcome["passed"]
    assert len(outcome["seconds_per_step"]) == 3
    assert [entry["rank"] for entry in outcome["ranks"]] == [1, 2]


def test_the_demo_fails_on_any_difference() -> None:
    from mapreduce.demo import verdicts

    good = {"digests": ["a", "b"], "losses": [2.0, 0.5]}
    assert all(verdicts([good, good], ["a", "b"], [2.0, 0.5]).values())
    for wrong in (
        [good | {"digests": ["a", "x"]}, good],
        [good, good | {"losses": [2.0, 0.5001]}],
    ):
        assert not all(verdicts(wrong, ["a", "b"], [2.0, 0.5]).values())
    assert not all(verdicts([good, good], ["a", "x"], [2.0, 0.5]).values())
    assert not all(verdicts([good, good], ["a", "b"], [2.0, 0.51]).values())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_incentives_demo_passes_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, "-m", "mapreduce.demo_incentive", "--json", str(path)],
        cwd=ROOT,
        env=CLEAN_ENV,
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    outcome = json.loads(path.read_text())
    assert outcome["passed"]
    assert [row["weight"] for row in outcome["rows"] if row["lies"]] == [0.0]


# Neurons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_help_needs_no_wallet_and_no_chain(role: str) -> None:
    done = python(f"neurons/{role}.py", "--help")
    assert done.returncode == 0
    assert "--subtensor.network" in done.stdout


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_an_unregistered_wallet_gets_the_command_that_registers_it(
    subnet: LocalSubnet, role: str
) -> None:
    done = python(f"neurons/{role}.py", *flags(subnet))
    assert done.returncode == 2
    command = re.search(r"`python -m (mapreduce\.chain register .*?)`", done.stderr)
    assert command is not None, done.stderr
    assert "Traceback" not in done.stderr


def test_errors_of_an_operator_are_one_line(subnet: LocalSubnet) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        address = ["--axon.ip", "127.0.0.1", "--axon.port", port]
        done = python("neurons/miner.py", *flags(subnet, "miner-1"), *address)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot listen on 127.0.0.1:{port}: the port is in use")

    done = python("neurons/miner.py", *flags(subnet, "nobody"))
    assert done.returncode == 2
    assert "btcli wallet create" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_neurons_stop_cleanly(number: signal.Signals) -> None:
    with LocalSubnet(miners=1) as subnet:
        assert subnet.validator is not None
        for child in (subnet.miners[0], subnet.validator):
            child.send_signal(number)
            assert child.wait(10.0) == 0, child.last_lines()
            assert "Traceback" not in "\n".join(child.last_lines())
