"""All-reduce over loopback beside its floor and a gloo ring, in one run: `make bench`.

The floor is what the machine moves over loopback sockets at all: an all-reduce of D bytes by K
peers carries 2 K D bytes through miners, at the rate of a raw socket between two processes. gloo
reduces among the peers themselves, without miners. One direction is counted; medians and 95th
percentiles of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mapreduce.local import LocalSubnet
from mapreduce.net.loop import new_event_loop
from mapreduce.processes import free_port

FLOOR_BYTES = 2 << 30
FLOOR_RUNS = 5
SOCKET_WRITE = 1 << 20
WARM_UP_STEPS = 2


def raw_rate() -> float:
    """Bytes per second of one raw loopback stream between two processes, median of FLOOR_RUNS."""
    rates = []
    for _ in range(FLOOR_RUNS):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            sender = multiprocessing.get_context("spawn").Process(target=_send, args=(port,))
            sender.start()
            connection, _ = server.accept()
            buffer = memoryview(bytearray(SOCKET_WRITE))
            received = connection.recv_into(buffer)  # the clock starts with the first bytes
            started, first = time.perf_counter(), received
            while count := connection.recv_into(buffer):
                received += count
            rates.append((received - first) / (time.perf_counter() - started))
            connection.close()
            sender.join()
    return statistics.median(rates)


def _send(port: int) -> None:
    data = bytes(SOCKET_WRITE)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(FLOOR_BYTES // SOCKET_WRITE):
            connection.sendall(data)


class Steps:
    """Times `steps` all-reduces of `nbytes` on one rank; picklable for its process."""

    def __init__(self, nbytes: int, steps: int) -> None:
        self.nbytes = nbytes
        self.steps = steps

    def __call__(self, peer: Any) -> list[float]:
        tensor = torch.ones(self.nbytes // 4)
        return [self._timed(lambda: peer.all_reduce(tensor)) for _ in range(self._total)]

    @property
    def _total(self) -> int:
        return WARM_UP_STEPS + self.steps

    @staticmethod
    def _timed(step: Any) -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    def gloo(self, rank: int, world_size: int, port: int, path: str) -> None:
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
        store = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        tensor = torch.ones(self.nbytes // 4)
        seconds = [self._timed(lambda: dist.all_reduce(tensor)) for _ in range(self._total)]
        dist.destroy_process_group()
        Path(path, str(rank)).write_text(json.dumps(seconds))


def summary(ranks: list[list[float]]) -> tuple[float, float]:
    """Median and 95th percentile of the slowest rank of each step, warm-up left out."""
    slowest = [max(step) for step in zip(*ranks, strict=True)][WARM_UP_STEPS:]
    return statistics.median(slowest), sorted(slowest)[int(0.95 * (len(slowest) - 1))]


def ours(peers: int, miners: int, steps: Steps) -> tuple[float, float]:
    with LocalSubnet(miners=miners) as subnet:
        return summary(subnet.run(steps, peers, steps.nbytes, miner_count=miners))


def gloo(peers: int, steps: Steps) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as path:
        arguments = (peers, free_port(), path)
        ranks = [context.Process(target=steps.gloo, args=(r, *arguments)) for r in range(peers)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return summary([json.loads(Path(path, str(r)).read_text()) for r in range(peers)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4], help="K; N is the same")
    parser.add_argument("--bytes", type=int, default=105 * 10**6, help="of one tensor")
    parser.add_argument("--steps", type=int, default=10, help="counted steps")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    options = parser.parse_args()
    nbytes = options.bytes // 4 * 4
    steps = Steps(nbytes, options.steps)
    rate = raw_rate()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    loop = type(new_event_loop()).__module__
    print(f"{' '.join(sys.argv)}: {machine}, {loop}, torch {torch.__version__}")
    print(f"raw loopback: {rate / 1e9:.2f} GB/s; tensor: {nbytes / 1e6:.1f} MB")
    print(" K=N  floor s  ours s (p95)    x floor  gloo s (p95)    ours / gloo")
    rows = []
    for count in options.peers:
        floor = 2 * count * nbytes / rate
        (our_s, our_p95), (gloo_s, gloo_p95) = ours(count, count, steps), gloo(count, steps)
        print(
            f"{count:>4}  {floor:7.3f}  {our_s:6.3f} ({our_p95:.3f})  {our_s / floor:7.2f}  "
            f"{gloo_s:6.3f} ({gloo_p95:.3f})  {our_s / gloo_s:11.2f}"
        )
        rows.append(
            {
                "peers": count,
                "miners": count,
                "bytes": nbytes,
                "floor_s": floor,
                "ours_median_s": our_s,
                "ours_p95_s": our_p95,
                "gloo_median_s": gloo_s,
                "gloo_p95_s": gloo_p95,
            }
        )
    if options.json:
        outcome = {"argv": sys.argv, "machine": machine, "raw_bytes_per_s": rate, "rows": rows}
        options.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
