"""The file under the embedded chain: what is refused, and what a failing disk leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING

import bittensor as bt
import pytest

from mapreduce.chain.embedded import create_chain
from mapreduce.chain.ledger import Ledger, open_ledger
from mapreduce.errors import ChainUnavailable, ConfigError
from test.unit.test_chain_support import (
    NETUID,
    error_name,
    isolated,  # noqa: F401
    keys,
    opened,
)

if TYPE_CHECKING:
    from pathlib import Path


def empty(path: Path) -> Ledger:
    return open_ledger(path, lambda ledger: None)


async def block_of(path: Path) -> int:
    async with opened(path) as client:
        return await client.block()


def test_keys_are_found_by_prefix_and_in_order(tmp_path: Path) -> None:
    ledger = empty(tmp_path / "ledger")
    for entry in ([10, "b"], [10, "a"], [1, "x"], [100, "y"], [2, "z"]):
        ledger.put("P", "Map", entry, entry)
    ledger.put("P", "Map2", [10, "a"], "another")
    assert ledger.scan("P", "Map", [10]) == [(("a",), [10, "a"]), (("b",), [10, "b"])]
    assert [key for key, _ in ledger.scan("P", "Map")] == [
        (1, "x"),
        (2, "z"),
        (10, "a"),
        (10, "b"),
        (100, "y"),
    ]
    assert ledger.get("P", "Map", [10, "c"]) is None
    ledger.close()


def test_one_connection_writes_at_a_time_and_the_other_keeps_reading(tmp_path: Path) -> None:
    first, second = empty(tmp_path / "ledger"), empty(tmp_path / "ledger")
    assert first.begin()
    first.put("P", "Item", [], 1)
    assert not second.begin()
    assert second.get("P", "Item") is None
    first.commit()
    assert second.get("P", "Item") == 1
    with first.snapshot():
        assert first.get("P", "Item") == 1
        assert second.begin()
        second.put("P", "Item", [], 2)
        second.commit()
        assert first.get("P", "Item") == 1
    assert first.get("P", "Item") == 2
    first.close()
    second.close()


def test_a_savepoint_undoes_only_its_own(tmp_path: Path) -> None:
    ledger = empty(tmp_path / "ledger")
    assert ledger.begin()
    ledger.put("P", "Item", [1], "kept")
    with contextlib.suppress(RuntimeError), ledger.savepoint():
        ledger.put("P", "Item", [2], "lost")
        raise RuntimeError
    ledger.commit()
    assert ledger.scan("P", "Item") == [((1,), "kept")]
    ledger.close()


def test_files_that_are_no_chain_are_named_and_left_alone(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a database" * 100)
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    newer = tmp_path / "newer"
    create_chain(newer)
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for path, reason in (
        (garbage, "file is not a database"),
        (foreign, "a database of another program"),
        (newer, "has format 99, this version reads 1"),
        (tmp_path, "unable to open database file"),
        (garbage / "below" / "a.file", "Not a directory"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ConfigError, match=reason) as caught:
            asyncio.run(block_of(path))
        assert str(path) in str(caught.value)
        assert before is None or path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"sealed/chain\.sqlite"):
        asyncio.run(block_of(tmp_path / "sealed" / "chain.sqlite"))


def test_a_chain_is_created_once_and_with_sense(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "chain.sqlite"
    create_chain(path)
    with pytest.raises(ConfigError, match="already holds an embedded chain"):
        create_chain(path)
    with pytest.raises(ConfigError, match="block_time_s = 0"):
        create_chain(tmp_path / "other", block_time_s=0)
    with pytest.raises(ConfigError, match=r"no hyperparameter 'temp'; there are: .*tempo"):
        create_chain(tmp_path / "other", hyperparameters={"temp": 1})
    with pytest.raises(ConfigError, match="hyperparameter tempo = -1"):
        create_chain(tmp_path / "other", tempo=-1)
    assert not (tmp_path / "other").exists()


def test_a_page_lost_in_the_middle_is_reported_with_the_files_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "chain.sqlite"
        create_chain(path)
        data = bytearray(path.read_bytes())
        data[4096:] = os.urandom(len(data) - 4096)
        path.write_bytes(data)
        with pytest.raises((ConfigError, ChainUnavailable), match=r"chain\.sqlite.*malformed"):
            async with opened(path) as client:
                await client.subnets.metagraph(NETUID)

    asyncio.run(scenario())


def test_a_full_disk_fails_the_extrinsic_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path / "chain.sqlite") as client:
            one = keys("one").coldkey
            ledger = client._substrate._open.ledger
            (pages,) = ledger._execute("PRAGMA page_count")[0]
            ledger._execute(f"PRAGMA max_page_count = {pages + 4}")

            async def pay(name: str) -> bt.ExtrinsicResult:
                dest = keys(name).coldkey.ss58_address
                call = bt.calls.Balances.transfer_keep_alive(dest=dest, value=1)
                return await client.submit_call(call, one)

            paid = 0
            while (result := await pay(f"other{paid}")).success:
                paid += 1
            assert paid > 0
            assert result.error is not None
            assert result.error.code is bt.ErrorCode.INTERNAL
            assert "chain.sqlite failed: database or disk is full" in result.message
            assert await client._substrate.account_next_index(one.ss58_address) == paid
            assert (await client.balances.get(one.ss58_address)).rao == 10_000 * 10**9 - paid
            # Space again: the same connection goes on where it was.
            ledger._execute("PRAGMA max_page_count = 100000")
            assert error_name(await pay("late")) is None
            assert await client._substrate.account_next_index(one.ss58_address) == paid + 1

    asyncio.run(scenario())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_vanished_under_a_process_stops_it(tmp_path: Path, replaced: bool) -> None:
    async def scenario() -> None:
        path = tmp_path / "chain.sqlite"
        async with opened(path) as client:
            path.unlink()
            if replaced:
                create_chain(path)
            with pytest.raises(ChainUnavailable, match=r"chain\.sqlite was removed or replaced"):
                await client.block()

    asyncio.run(scenario())
