"""The embedded chain under several real processes, one of them killed, and its command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import bittensor as bt
import pytest

from mapreduce.chain.__main__ import main
from mapreduce.chain.actions import register_hotkey
from mapreduce.chain.wallets import create_wallet
from test.unit.test_chain_support import (
    NETUID,
    isolated,  # noqa: F401
    keys,
    opened,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# A forked child starts in milliseconds where a fresh interpreter imports bittensor for a second.
FORK = multiprocessing.get_context("fork")
WRITERS = 4
WRITES = 40


@contextlib.contextmanager
def children(target: Callable[..., None], *arguments: tuple[object, ...]) -> Iterator[list[int]]:
    """One forked process for each tuple of arguments; their exit codes fill the list in the end."""
    processes = [FORK.Process(target=target, args=args) for args in arguments]
    codes: list[int] = []
    for process in processes:
        process.start()
    try:
        yield codes
        for process in processes:
            process.join(60)
            assert process.exitcode is not None, "a child hangs"
            codes.append(process.exitcode)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def pay(path: Path, payer: str, receiver: str, count: int) -> None:
    """Send 1 rao `count` times, each of which must succeed."""

    async def work() -> None:
        async with opened(path) as client:
            call = bt.calls.Balances.transfer_keep_alive(
                dest=keys(receiver).coldkey.ss58_address, value=1
            )
            for _ in range(count):
                (await client.submit_call(call, keys(payer).coldkey)).raise_for_failure()

    asyncio.run(work())


def enroll(path: Path, name: str) -> None:
    """Create the chain if need be, then register a hotkey of a coldkey that all share."""

    async def work() -> None:
        async with opened(path) as client:
            await register_hotkey(client, keys("shared", name), NETUID)

    asyncio.run(work())


def pay_forever(path: Path, confirmed: int) -> None:
    """Send 1 rao again and again, writing a byte to the file descriptor for every success."""

    async def work() -> None:
        async with opened(path) as client:
            call = bt.calls.Balances.transfer_keep_alive(
                dest=keys("receiver").coldkey.ss58_address, value=1
            )
            while True:
                (await client.submit_call(call, keys("payer").coldkey)).raise_for_failure()
                os.write(confirmed, b".")

    asyncio.run(work())


async def account(path: Path, name: str) -> tuple[int, int]:
    """(nonce, rao above or below what everybody starts with)"""
    async with opened(path) as client:
        address = keys(name).coldkey.ss58_address
        nonce = await client._substrate.account_next_index(address)
        balance = await client.balances.get(address)
        return nonce, balance.rao - 10_000 * 10**9


def test_concurrent_writers_with_one_key_lose_no_write(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite"  # created by whichever comes first
    with children(pay, *[(path, "payer", "receiver", WRITES)] * WRITERS) as codes:
        pass
    assert codes == [0] * WRITERS
    total = WRITERS * WRITES
    assert asyncio.run(account(path, "payer")) == (total, -total)
    assert asyncio.run(account(path, "receiver")) == (0, total)


def test_concurrent_registrations_get_different_uids(tmp_path: Path) -> None:
    async def uids(path: Path) -> list[int]:
        async with opened(path) as client:
            return [neuron.uid for neuron in await client.neurons.all(NETUID)]

    path = tmp_path / "chain.sqlite"
    with children(enroll, *[(path, f"hotkey-{i}") for i in range(WRITERS)]) as codes:
        pass
    assert codes == [0] * WRITERS
    assert asyncio.run(uids(path)) == list(range(WRITERS))


def test_a_killed_writer_leaves_whole_extrinsics_only(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite"
    for attempt in range(3):
        before, _ = asyncio.run(account(path, "payer"))
        reader, writer = os.pipe()
        process = FORK.Process(target=pay_forever, args=(path, writer))
        process.start()
        os.close(writer)
        confirmed = 0
        while confirmed < 20 + attempt:
            confirmed += len(os.read(reader, 1))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while byte := os.read(reader, 4096):
            confirmed += len(byte)
        os.close(reader)
        nonce, change = asyncio.run(account(path, "payer"))
        # One more may have been written in the moment before it could be confirmed.
        assert nonce - before in (confirmed, confirmed + 1)
        assert change == -nonce
        assert asyncio.run(account(path, "receiver"))[1] == nonce


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    create_wallet(str(tmp_path), "operator")
    return [f"--subtensor.network=embedded:{tmp_path / 'chain.sqlite'}"]


@pytest.fixture
def wallet(tmp_path: Path) -> list[str]:
    return ["--wallet.name", "operator", "--wallet.path", str(tmp_path)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mapreduce.chain", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_register_from_the_command_line(flags: list[str], wallet: list[str]) -> None:
    first = run("register", *flags, *wallet)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.endswith("on netuid 10 as uid 0\n")
    second = run("register", *flags, *wallet)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("error: the hotkey ")
    assert second.stderr.endswith("is already registered on netuid 10 as uid 0\n")
    assert second.stderr.count("\n") == 1


def test_stake_and_show_from_the_command_line(flags: list[str], wallet: list[str]) -> None:
    assert main(["register", *flags, *wallet]) == 0
    staked = run("stake", "--amount", "7.5", *flags, *wallet)
    assert (staked.returncode, staked.stderr) == (0, "")
    assert staked.stdout.startswith("staked 7.5 TAO on ")
    shown = run("show", "--json", *flags)
    assert (shown.returncode, shown.stderr) == (0, "")
    record = json.loads(shown.stdout)
    assert record["netuid"] == 10
    assert record["block"] >= 1
    (neuron,) = record["neurons"]
    assert (neuron["uid"], neuron["stake_tao"], neuron["validator_permit"]) == (0, 7.5, True)
    assert (neuron["ip"], neuron["port"]) == (None, None)


def test_show_prints_a_table(
    flags: list[str], wallet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", *flags, *wallet]) == 0
    capsys.readouterr()
    assert main(["show", *flags]) == 0
    heading, columns, row = capsys.readouterr().out.splitlines()
    assert "netuid 10, block " in heading
    named = ["uid", "hotkey", "coldkey", "stake", "permit", "incentive", "updated", "axon"]
    assert columns.split() == named
    assert row.split()[0] == "0"
    assert row.split()[3:] == ["0.000", "no", "0.0000", "-", "-"]


def test_help_needs_neither_a_chain_nor_a_wallet(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["register"], ["stake"], ["show"]):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
        assert "usage: python -m mapreduce.chain" in capsys.readouterr().out


def test_command_line_errors_are_one_line_that_helps(
    tmp_path: Path,
    flags: list[str],
    wallet: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    nobody = ["--wallet.name", "nobody", "--wallet.path", str(tmp_path)]
    (tmp_path / "garbage").write_text("no database")
    for arguments, message in (
        (["register", *flags, *nobody], "`btcli wallet create --wallet nobody"),
        (["register", "--netuid", "77", *flags, *wallet], "netuid = 77: there is no such subnet"),
        (["stake", "--amount", "1", *flags, *wallet], "`python -m mapreduce.chain register --subt"),
        (["register", *flags, *wallet], None),
        (["stake", "--amount", "1e9", *flags, *wallet], "holds 9999.9 TAO"),
        (["show", "--subtensor.network", "finny"], "'finny' is unknown; allowed is finney"),
        (["show", "--subtensor.network", f"embedded:{tmp_path}/garbage"], "file is not a database"),
        (["show", "--subtensor.network", "ws://127.0.0.1:1"], "no answer from the chain at ws://"),
    ):
        code = main(arguments)
        errors = capsys.readouterr().err
        if message is None:
            assert code == 0
        else:
            assert code == 1
            assert errors.startswith("error: ")
            assert message in errors
            assert errors.count("\n") == 1
