"""`python -m test.faults.stopped DIRECTORY LEAST_S ROLE FLAGS...`: a neuron that can be stopped.

Once DIRECTORY holds a file `frozen`, this process's clock of the embedded chain stands still; with
`blocked` its event loop does; with `hung` it does not end when it is told to. LEAST_S is how long
it may see no block, and bounds the other times too. Knows where these things are; knows nothing of
what must follow.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapreduce.chain.embedded import EmbeddedSubstrate
from mapreduce.config import run_cli
from mapreduce.services import neuron, watchdog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LOOK_S = 0.05


class StoppableClock:
    """The time, until `frozen` is there."""

    def __init__(self, frozen: Path) -> None:
        self._frozen = frozen
        self._at: float | None = None

    def __call__(self) -> float:
        if self._at is None and self._frozen.exists():
            self._at = time.time()
        elif self._at is not None and not self._frozen.exists():
            self._at = None
        return time.time() if self._at is None else self._at


def block_once_told(blocked: Path) -> None:
    """What a long computation in a handler would do to the loop."""
    if blocked.exists():
        time.sleep(3600)
    asyncio.get_running_loop().call_later(LOOK_S, block_once_told, blocked)


def main() -> int:
    directory, least_s, role = Path(sys.argv.pop(1)), float(sys.argv.pop(1)), sys.argv.pop(1)
    hung = directory / "hung"
    watchdog.GRACE_S = min(least_s, watchdog.GRACE_S)
    watchdog.SUSPENDED_S = min(least_s, watchdog.SUSPENDED_S)
    defaults = EmbeddedSubstrate.__init__.__kwdefaults__
    assert defaults is not None
    defaults["clock"] = StoppableClock(directory / "frozen")

    @asynccontextmanager
    async def watched(*arguments: Any) -> AsyncIterator[None]:
        block_once_told(directory / "blocked")
        async with watchdog.watched(*arguments, least_s=least_s):
            yield
        if hung.exists():
            await asyncio.sleep(3600)

    neuron.watched = functools.wraps(watchdog.watched)(watched)
    code: int = importlib.import_module(f"neurons.{role}").main()
    return code


if __name__ == "__main__":
    run_cli(main)
