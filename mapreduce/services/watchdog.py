"""Ends a neuron that sees no blocks any more, so that whatever started it can start it again.

A task asks for blocks and connects anew; a thread watches, so that a blocked event loop cannot keep
it from acting. Knows how a process is ended, gently and then by force; what counts as silence is in
`core/block_watch.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from mapreduce.chain.blocks import connect, disconnect, read_block, read_block_time
from mapreduce.config import EXIT_STALLED
from mapreduce.core.block_watch import LEAST_S, BlockWatch, silence_limit
from mapreduce.errors import ChainUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import bittensor as bt

TICK_S = 1.0
SUSPENDED_S = 10.0  # a tick so late means that the whole process stood still
ASKED = 20  # questions in the time that may pass without a block, or more:
MOST_S = 12.0  # from one to the next
LAST_WORD_S = 1.0
GRACE_S = 15.0  # for a clean stop, before the end by force

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def watched(
    client: bt.Client, stop: Callable[[str], None], *, least_s: float = LEAST_S
) -> AsyncIterator[None]:
    """While the context lasts, `stop` is called in the loop with the reason if there is no new
    block for ten block times and at least `least_s`. If the process has not ended GRACE_S later, it
    is ended with EXIT_STALLED. Raises ChainUnavailable if the chain does not answer at the start.
    """
    limit_s = silence_limit(await read_block_time(client), least_s)
    watch = BlockWatch(limit_s, time.monotonic())
    following = asyncio.create_task(_follow(client, watch))
    over = threading.Event()
    loop = asyncio.get_running_loop()

    def tell(reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(stop, reason)

    thread = threading.Thread(
        target=_guard,
        args=(watch, threading.get_ident(), tell, over),
        name="watchdog",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        following.cancel()
        await asyncio.wait([following])


async def _follow(client: bt.Client, watch: BlockWatch) -> None:
    """Asks for the newest block, and connects anew while none comes."""
    pause_s = min(watch.limit_s / ASKED, MOST_S)
    connected = True
    while True:
        watch.asks(time.monotonic())
        try:
            async with asyncio.timeout(watch.patience_s):
                if watch.reconnect_due(time.monotonic()):
                    silence_s = round(watch.silence_s(time.monotonic()))
                    _log.warning("no new block: connecting anew", extra={"for_s": silence_s})
                    connected = False
                    await disconnect(client)
                if not connected:
                    await connect(client)
                    connected = True
                watch.saw(await read_block(client), time.monotonic())
        except (ChainUnavailable, TimeoutError) as error:
            watch.failed(str(error) or f"no answer in {watch.patience_s:g} s")
        await asyncio.sleep(pause_s)


def _guard(
    watch: BlockWatch, loop_thread: int, tell: Callable[[str], None], over: threading.Event
) -> None:
    """The thread: looks at the watch until it is `over`, or there is a verdict to carry out."""
    looked_at = time.monotonic()
    reason: str | None = None
    while reason is None:
        if over.wait(TICK_S):
            return
        now = time.monotonic()
        if now - looked_at > SUSPENDED_S:
            watch.restart(now)
        looked_at = now
        reason = watch.verdict(now)
    if watch.is_blocked(looked_at):
        reason += _where(loop_thread)
    tell(reason)
    # Not `over`: what comes after it, closing files say, may hang too.
    time.sleep(GRACE_S)
    _end(f"{reason}; it did not stop within {GRACE_S:g} s and is ended by force")


def _where(thread: int) -> str:
    """What a thread is doing, for people."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    place = traceback.extract_stack(frame)[-1]
    return f", in {place.name} ({place.filename}:{place.lineno})"


def _end(reason: str) -> None:
    """Ends this process now. Its last words may not be heard: stderr may be a pipe that is full."""
    line = f"error: {reason}\n".encode(errors="replace")
    words = threading.Thread(target=os.write, args=(2, line), daemon=True)
    words.start()
    words.join(LAST_WORD_S)
    os._exit(EXIT_STALLED)
