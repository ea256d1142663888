"""An event loop on a thread of its own, for callers that block.

Knows threads and Ctrl+C, nothing of what runs there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Result = TypeVar("Result")

INTERRUPT_GRACE_S = 3.0


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The event loop that neurons and peers run on.

    uvloop: `bench/loopback.py` takes 1.3 times as long on asyncio's own loop, which also works.
    """
    return uvloop.new_event_loop()


class LoopThread:
    """Runs coroutines for threads that wait for them.

    Works where another loop is already running.
    """

    def __init__(self, name: str) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(
        self,
        coroutine: Coroutine[Any, Any, Result],  # Any: a coroutine's unused send and yield types
        on_interrupt: Callable[[], object] | None = None,
    ) -> Result:
        """Runs the coroutine on the loop and returns what it returns.

        If Ctrl+C arrives meanwhile, `on_interrupt` is called on the loop and the coroutine gets a
        short time to end in good order, before KeyboardInterrupt goes on. However it ends, it has
        done with the caller's memory by then.
        """
        ended = threading.Event()

        async def run() -> Result:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                if on_interrupt is not None:
                    self._loop.call_soon_threadsafe(on_interrupt)
                    concurrent.futures.wait([future], timeout=INTERRUPT_GRACE_S)
                future.cancel()
            ended.wait(INTERRUPT_GRACE_S)
            raise

    def close(self) -> None:
        """Stops the loop and waits for its thread. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(timeout=10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _drain(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()
