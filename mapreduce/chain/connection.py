"""An open embedded chain: its file, its clock and its turn to write. Knows how the block number
follows the clock and how a change is made alone; knows nothing of the SDK or of what is read and
changed.

The block number follows the wall clock, so there is no block producer and no daemon: processes
agree because they read the same clock. It never goes back; after a clock was set back it stands
still until the clock has caught up.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import TYPE_CHECKING, Final, TypeVar

from mapreduce.chain import epoch
from mapreduce.chain.genesis import new_genesis, read_genesis, write_genesis
from mapreduce.chain.ledger import open_ledger
from mapreduce.chain.state import State
from mapreduce.errors import ChainUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

_WRITE_PATIENCE_S: Final = 30.0  # another process holds the lock for about a millisecond, normally


class Connection:
    """The state of one chain as this process sees it. Use it from the thread that opened it."""

    def __init__(
        self, path: Path, clock: Callable[[], float], *, before: tuple[int, int] | None = None
    ) -> None:
        """Open the file, creating a chain with the default parameters where there is none. `before`
        is the `file` of an earlier connection, if this must be the same one.

        Raises:
            ConfigError: the file cannot be opened or is no chain of this version.
            ChainUnavailable: it is not the file that it was.
        """
        if before is not None:
            _require_same(path, before)
        ledger = open_ledger(path, lambda new: write_genesis(new, new_genesis(now_s=clock())))
        self.genesis = read_genesis(ledger)
        self.ledger = ledger
        self.state = State(ledger, self.genesis)
        self._clock = clock
        self.file = _identity(path)

    def close(self) -> None:
        """Close the file."""
        self.ledger.close()

    def head(self) -> int:
        """The newest block.

        Raises:
            ChainUnavailable: the file was removed or replaced under this process.
        """
        # SQLite would go on with the removed file, and this process would live on a chain of its
        # own.
        _require_same(self.ledger.path, self.file)
        age_s = max(self._clock() - self.genesis.created_at_s, 0.0)
        by_clock = 1 + int(age_s / self.genesis.block_time_s)
        return max(by_clock, int(self.ledger.get("System", "Number")))

    def block_time_unix_s(self, block: int) -> float:
        """When a block begins."""
        return self.genesis.created_at_s + max(block - 1, 0) * self.genesis.block_time_s

    def seconds_until(self, block: int) -> float:
        """How long until a block begins; negative for one that has begun."""
        return self.block_time_unix_s(block) - self._clock()

    async def settle(self) -> int:
        """The newest block, once the epochs that are due by then have run."""
        block = self.head()
        if epoch.due(self.state, block):
            await self.write(lambda state, block: None)
        return block

    async def write(self, change: Callable[[State, int], T]) -> T:
        """Carry out `change(state, block)` alone, and whole or not at all.

        Raises:
            ChainUnavailable: the disk or the file fails, or another process does not end its turn.
        """
        deadline_s = time.monotonic() + _WRITE_PATIENCE_S
        while not self.ledger.begin():
            if time.monotonic() > deadline_s:
                raise ChainUnavailable(
                    f"another process keeps the embedded chain {self.ledger.path} locked "
                    f"for more than {_WRITE_PATIENCE_S:g} s"
                )
            await asyncio.sleep(random.uniform(0.0005, 0.004))
        # No await from here to the commit: a cancelled task leaves no transaction behind.
        try:
            block = self.head()
            self.ledger.put("System", "Number", [], block)
            if epoch.due(self.state, block):
                epoch.run_due(self.state, block)
            result = change(self.state, block)
            self.ledger.commit()
        except BaseException:
            self.ledger.rollback()
            raise
        return result


def _require_same(path: Path, file: tuple[int, int] | None) -> None:
    if _identity(path) != file:
        raise ChainUnavailable(
            f"the embedded chain {path} was removed or replaced; restart this process"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
