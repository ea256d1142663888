"""Ranks as threads of one process, as a notebook or a test would have them."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mapreduce.local import LocalSubnet
    from peer import Peer

_names = itertools.count()
BANDWIDTH = 1 << 22
JOIN_S = 60.0


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Runs all calls at once, each in a thread; what one raises stands in its result's place."""
    results: list[Any] = [None] * len(calls)

    def run(index: int, call: Callable[[], Any]) -> None:
        try:
            results[index] = call()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


def run_ranks(
    subnet: LocalSubnet, peer_count: int, fn: Callable[[Peer], Any], **options: Any
) -> list[Any]:
    """`fn(peer)` on every rank of a job of its own; results, or what was raised, in rank order."""
    options = {"bandwidth": BANDWIDTH, "job": f"test {next(_names)}"} | options

    def one(rank: int) -> Any:
        with subnet.peer(rank, peer_count, **options) as peer:
            return fn(peer)

    return together(*(lambda rank=rank: one(rank) for rank in range(1, peer_count + 1)))


def open_ranks(subnet: LocalSubnet, peer_count: int, **options: Any) -> list[Peer]:
    """Open peers of one job; the caller destroys them."""
    options = {"bandwidth": BANDWIDTH, "job": f"test {next(_names)}"} | options
    peers = [subnet.peer(rank, peer_count, **options) for rank in range(1, peer_count + 1)]
    for error in together(*(peer.init_process_group for peer in peers)):
        if error is not None:
            raise error
    return peers


def succeed(results: list[Any]) -> list[Any]:
    """The results, none of which is an error."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def wait_for(condition: Callable[[], object], what: str, within_s: float = 15.0) -> None:
    """Polls until the condition holds; fails naming what did not happen."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.01)
