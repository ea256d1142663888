"""One process per rank: runs a function in each and collects what they return.

Knows processes, pipes and Ctrl+C; what the ranks do, and with whom they talk, is their own
business.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Result = TypeVar("Result")

STOP_GRACE_S = 5.0
RANK_GRACE_S = 10.0  # for the other ranks to fail by themselves, once one has


class RankFailed(LocalError):
    """A rank's process ended without a result; carries the rank and what it said last."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank = rank


def run_ranks(
    fn: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],  # Any: whatever `fn` takes, if it can be pickled
    timeout_s: float,
) -> list[Result]:
    """Runs `fn(*arguments[i])` in a process of its own for rank i + 1; returns results in rank
    order.

    `fn` must be a function of a module, and its result picklable. When it returns or raises, no
    process is left.

    Raises:
        Exception: what `fn` raised, of the first rank that failed.
        RankFailed: a process died, or did not end within `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    ranks: list[_Rank] = []
    try:
        for rank, given in enumerate(arguments, start=1):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(rank, fn, given, theirs), name=f"rank {rank}"
            )
            with _interrupts_ignored():
                process.start()
            theirs.close()
            ranks.append(_Rank(rank, process, ours))
        return _collect(ranks, timeout_s)
    finally:
        for entry in ranks:
            entry.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """For what is started inside: Ctrl+C is for this process, which then ends its ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may, and only it gets the interrupt
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Rank:
    """One rank's process, seen from the parent."""

    def __init__(
        self, rank: int, process: Any, results: multiprocessing.connection.Connection
    ) -> None:
        self.rank = rank
        self.process = process
        self.results = results

    def take(self) -> tuple[bool, Any]:
        """Whether it succeeded, and its result or exception."""
        try:
            succeeded, value = self.results.recv()
        except EOFError:
            self.process.join(STOP_GRACE_S)
            code = self.process.exitcode
            return False, RankFailed(self.rank, f"its process ended with exit code {code}")
        return succeeded, value

    def close(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(STOP_GRACE_S)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.results.close()


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failure: BaseException | None = None
    waiting = {entry.results: entry for entry in ranks}
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = multiprocessing.connection.wait(
            list(waiting), max(0.0, deadline - time.monotonic())
        )
        if not ready:
            if failure is not None:
                break
            slow = sorted(entry.rank for entry in waiting.values())
            raise RankFailed(slow[0], f"ranks {slow} did not end within {timeout_s:g} s")
        for connection in ready:
            assert isinstance(connection, multiprocessing.connection.Connection)
            entry = waiting.pop(connection)
            succeeded, value = entry.take()
            if succeeded:
                results[entry.rank] = value
            elif failure is None:
                failure = value
                deadline = min(deadline, time.monotonic() + RANK_GRACE_S)
    if failure is not None:
        raise failure
    return [results[entry.rank] for entry in ranks]


def _run(
    rank: int,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: multiprocessing.connection.Connection,
) -> None:
    """The main function of a rank's process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        outcome = (True, fn(*arguments))
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        error.add_note(f"in rank {rank}:\n{trace}")
        outcome = (False, error)
    try:
        results.send(outcome)
    except Exception as error:  # whatever its pickling raises
        results.send((False, RankFailed(rank, f"its result cannot be sent: {error!r}")))
    with contextlib.suppress(OSError):
        results.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
