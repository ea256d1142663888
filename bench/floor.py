"""What the wire itself carries: raw TCP between two hosts, without any protocol of ours, and the
least time that a collective can take at that rate."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.processes import free_port
from mapreduce.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.lab import Host

RUNS = 5
PIECE_BYTES = 1 << 20
TIMEOUT_S = 300.0


def links_floor_s(nbytes: int, peers: Sequence[float], miners: Sequence[float]) -> float:
    """Seconds that a collective takes at least: each peer's link carries the tensor once in each
    direction, and the miners' links together carry it once per peer. Links in bytes per second."""
    return max(nbytes / min(peers), len(peers) * nbytes / sum(miners))


def equal_split_floor_s(nbytes: int, peers: Sequence[float], miners: Sequence[float]) -> float:
    """The same if every miner gets an equal segment, however slow its link is."""
    return max(nbytes / min(peers), len(peers) * nbytes / len(miners) / min(miners))


def loopback_floor_s(nbytes: int, peers: int, bytes_per_s: float) -> float:
    """Seconds of an all-reduce on one machine at the rate of one raw stream: every peer's tensor
    goes to the miners, and comes back."""
    return 2 * peers * nbytes / bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What one raw stream does: its rate, and what its two ends cost."""

    bytes_per_s: float
    send_cpu_s_per_GB: float
    receive_cpu_s_per_GB: float


def one_way(nbytes: int, host: Host) -> Raw:
    """One stream between two processes of a host, median of RUNS."""
    received, sent = _measure(host, host, nbytes, both=False)
    per_run = RUNS * nbytes / 1e9
    return Raw(
        bytes_per_s=received.bytes_per_s,
        send_cpu_s_per_GB=sent.cpu_s / per_run,
        receive_cpu_s_per_GB=received.cpu_s / per_run,
    )


def both_ways(nbytes: int, first: Host, second: Host) -> float:
    """Bytes per second and direction of two streams between two hosts, one each way at the same
    time, median of RUNS; the slower direction counts."""
    return min(end.bytes_per_s for end in _measure(first, second, nbytes, both=True))


@dataclass(frozen=True, slots=True)
class _End:
    """What one of the two processes saw: the median rate at which it received, if it did."""

    bytes_per_s: float
    cpu_s: float


def _measure(first: Host, second: Host, nbytes: int, *, both: bool) -> list[_End]:
    port = free_port()
    ends = [(first, first.ip, port, nbytes, both, 0), (second, first.ip, port, nbytes, both, 1)]
    return run_ranks(_end, ends, TIMEOUT_S)


def _end(host: Host, ip: str, port: int, nbytes: int, both: bool, index: int) -> _End:
    """One of the two processes. If not `both`, the second sends and the first receives."""
    host.enter()
    rates = []
    server = socket.create_server((ip, port)) if index == 0 else None
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(RUNS):
        upward = _connect(server, ip, port)  # the first host's data arrive on it
        downward = _connect(server, ip, port)
        outgoing, incoming = (downward, upward) if index == 0 else (upward, downward)
        sends, receives = both or index == 1, both or index == 0
        sender = threading.Thread(target=_send, args=(outgoing, nbytes), daemon=True)
        if sends:
            sender.start()
        if receives:
            rates.append(_receive(incoming))
        if sends:
            sender.join()
        if not receives:
            incoming.recv(1)  # until the other side has closed: runs do not overlap
        upward.close()
        downward.close()
    after = resource.getrusage(resource.RUSAGE_SELF)
    if server is not None:
        server.close()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _End(statistics.median(rates) if rates else 0.0, cpu_s)


def _connect(server: socket.socket | None, ip: str, port: int) -> socket.socket:
    if server is not None:
        return server.accept()[0]
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((ip, port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _send(connection: socket.socket, nbytes: int) -> None:
    data = memoryview(bytes(PIECE_BYTES))
    with contextlib.suppress(OSError):  # the other side was stopped, and this one is next
        for start in range(0, nbytes, PIECE_BYTES):
            connection.sendall(data[: nbytes - start])
        connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket) -> float:
    """Bytes per second."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    first = received = connection.recv_into(buffer)  # the clock starts with the first bytes
    started = time.perf_counter()
    while count := connection.recv_into(buffer):
        received += count
    return (received - first) / (time.perf_counter() - started)
