"""All-reduce seconds of hivemind, without its matchmaking: a rival of ours.

K processes, each a `DecentralizedAverager` in its default mode: every peer reduces a share, in
float32, without compression. Knows hivemind only, and runs with an environment of its own (see
INSTALL), for hivemind's dependencies are not this package's.

What is timed on each rank: from the moment its group is assembled until the averaged tensor is
applied to its own. Finding the group, which takes seconds, is reported apart. libp2p encrypts the
streams between peers and cannot be told not to.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from multiprocessing.connection import Connection, wait
from typing import Any

INSTALL = "pip install hivemind==1.1.12 torch==2.13.0"  # `make bench-hivemind`
LOOPBACK = "127.0.0.1,"
WARM_UP_STEPS = 1
PATTERN = 251  # values of the tensor repeat with this period: a prime, so misplaced parts show
TOLERANCE = 1e-4  # of the mean, relative: hivemind adds in order of arrival and rounds each time
STOP_GRACE_S = 10.0  # hivemind itself allows 5 s to an averager and 3 s to a DHT


class Failed(Exception):
    """The measurement cannot go on; the message is one line."""


class OutOfTime(Failed):
    """The time limit is over."""


# In the process of a rank ---------------------------------------------------------------------


class Rank:
    """One hivemind peer; the parent calls its methods, all ranks together."""

    def __init__(self, rank: int, hosts: list[str], numel: int) -> None:
        import torch

        # As for gloo: K ranks share the cores, and more threads were slower.
        torch.set_num_threads(1)
        self._rank, self._peers = rank, len(hosts)
        self._ip, _, namespace = hosts[rank - 1].partition(",")
        if namespace:  # what this process starts will be there too
            from bench.lab import Host

            Host(self._ip, namespace).enter()
        self._pattern = torch.arange(numel, dtype=torch.float32).remainder_(PATTERN)
        self._tensor = torch.zeros(numel)
        self._span = multiprocessing.Array("d", 2, lock=False)  # shared with the averager's process
        self._dht: Any = None  # Any: hivemind is not installed where this file is checked
        self._averager: Any = None

    def start(self, initial_peers: list[str]) -> list[str]:
        """Starts the DHT's process, its p2p daemon and the averager's process; returns where the
        other ranks find this one."""
        import hivemind

        span = self._span

        # hivemind calls this method, in the averager's process, once the group is assembled, and
        # waits in it for the all-reduce. The clock is the system's monotonic one, the same in all
        # processes, so that `average` may subtract its own reading.
        class TimedAverager(hivemind.DecentralizedAverager):  # type: ignore[misc]  # it is an Any
            async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
                span[0] = time.perf_counter()
                gathered = await super()._aggregate_with_group(*args, **kwargs)
                span[1] = time.perf_counter()
                return gathered

            async def _shutdown(self, timeout: float | None) -> None:  # noqa: ASYNC109  # its name
                await super()._shutdown(timeout)
                await self._p2p.shutdown()  # hivemind leaves this one's socket in the file system

        # Port mapping and reachability checks would talk to the world outside.
        self._dht = hivemind.DHT(
            initial_peers,
            start=False,
            host_maddrs=[f"/ip4/{self._ip}/tcp/0"],
            nat_port_map=False,
            auto_nat=False,
        )
        self._dht.run_in_background()
        self._averager = TimedAverager(
            [self._tensor],
            self._dht,
            start=True,
            prefix="bench",
            target_group_size=self._peers,
            min_group_size=self._peers,
            min_matchmaking_time=2.0,
            request_timeout=1.0,
        )
        return [str(address) for address in self._dht.get_visible_maddrs()]

    def fill(self, step: int) -> None:
        with self._averager.get_tensors() as (tensor,):
            tensor.copy_(self._pattern).mul_(self._rank + step)

    def average(self, timeout_s: float) -> tuple[float, float]:
        """One averaging round: seconds of matchmaking, seconds of the all-reduce."""
        called = time.perf_counter()
        # A second try would hide a failed all-reduce.
        gathered = self._averager.step(timeout=timeout_s, allow_retries=False)
        if len(gathered) != self._peers:
            raise Failed(f"a group of {len(gathered)} peers, {self._peers} were started")
        assembled, applied = self._span
        return assembled - called, applied - assembled

    def check(self, step: int) -> None:
        # hivemind carries on without a peer that failed, so only the values tell that none did.
        mean = (self._peers + 1) / 2 + step
        with self._averager.get_tensors() as (tensor,):
            error = (tensor - self._pattern * mean).abs_().max().item()
        if not error <= TOLERANCE * mean * PATTERN:
            raise Failed(f"step {step} is not the mean of the ranks, but off by {error:g}")

    def close(self) -> None:
        for process in (self._averager, self._dht):
            if process is not None:
                process.shutdown()


def run_rank(connection: Connection, rank: int, hosts: list[str], numel: int) -> None:
    """Does what the parent asks until it says SIGTERM or is gone."""
    # What a rank starts joins its process group, so that the parent can end the p2p daemon too.
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    multiprocessing.set_start_method("fork", force=True)  # hivemind's processes share by forking
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")  # failures are told by the parent
    peer = None
    try:
        peer = Rank(rank, hosts, numel)
        while True:
            method, args = connection.recv()
            connection.send((None, getattr(peer, method)(*args)))
    except EOFError:
        pass
    except Exception as error:
        text = str(error).partition("\n")[0]
        name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        connection.send((name + text, None))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if peer is not None:
            peer.close()


# In the parent --------------------------------------------------------------------------------


class Ranks:
    """The processes of K ranks; on leaving the `with` none of their descendants is left."""

    def __init__(self, hosts: list[str], numel: int, deadline: float) -> None:
        self._deadline = deadline
        self._processes: list[Any] = []  # Any: a context's own process class
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        # Ctrl+C is for this process, which then ends its ranks.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for rank in range(1, len(hosts) + 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(theirs, rank, hosts, numel))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Ranks:
        return self

    def ask(self, method: str, *args: Any, ranks: slice = slice(None)) -> list[Any]:
        """Calls a method of `Rank` on all ranks at once; returns their results in rank order.

        Raises `Failed` if one failed or died, `OutOfTime` at the deadline.
        """
        chosen = self._connections[ranks]
        results: dict[Connection, Any] = {}
        try:
            for connection in chosen:
                connection.send((method, args))
            while len(results) < len(chosen):
                missing = [connection for connection in chosen if connection not in results]
                arrived = wait(missing, max(0.0, self._deadline - time.monotonic()))
                if not arrived:
                    raise OutOfTime(f"the time limit is over, during {method}")
                for connection in missing:
                    if connection not in arrived:
                        continue
                    error, results[connection] = connection.recv()
                    if error:
                        raise Failed(f"rank {self._connections.index(connection) + 1}: {error}")
        except (EOFError, OSError):
            raise Failed(f"a rank's process died during {method}") from None
        return [results[connection] for connection in chosen]

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C must not leave daemons
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + STOP_GRACE_S
        for process in self._processes:
            wait([process.sentinel], max(0.0, until - time.monotonic()))
            # Before it is joined, its number cannot belong to anyone else.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it had not come so far as to have a group
                process.kill()
            process.join()


def measure(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the slowest rank in each counted step: of the all-reduce, of matchmaking.

    Fewer steps than asked for if the time limit came first, but at least one, or `Failed`.
    """
    seconds: list[float] = []
    matchmaking: list[float] = []
    deadline = time.monotonic() + options.timeout
    with Ranks(options.hosts, options.bytes // 4, deadline) as ranks:
        try:
            # One after the other, each knowing all before it: peers that first dial each other
            # at the same time, in the all-reduce, may lose a stream; then a part is not averaged.
            addresses: list[str] = []
            for rank in range(len(options.hosts)):
                addresses += ranks.ask("start", addresses, ranks=slice(rank, rank + 1))[0]
            # Each call waits for all ranks, so that filling and checking take no core from a
            # rank that still reduces.
            for step in range(WARM_UP_STEPS + options.steps):
                ranks.ask("fill", step)
                spans = ranks.ask("average", max(0.1, deadline - time.monotonic()))
                ranks.ask("check", step)
                if step >= WARM_UP_STEPS:  # the others open connections and touch memory
                    matchmaking.append(max(span[0] for span in spans))
                    seconds.append(max(span[1] for span in spans))
        except OutOfTime as error:
            if not seconds:
                raise
            print(f"{error}: {len(seconds)} of {options.steps} steps counted", file=sys.stderr)
    return seconds, matchmaking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=int, default=4, help="K, at least 2, on loopback")
    parser.add_argument(
        "--hosts", nargs="+", metavar="IP,NAMESPACE", help="of the peers instead (bench/lab.py)"
    )
    parser.add_argument("--bytes", type=int, default=105 * 10**6, help="of the float32 tensor")
    parser.add_argument("--steps", type=int, default=5, help="counted steps, after one to warm up")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for everything")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    options.hosts = options.hosts or [LOOPBACK] * options.peers
    peers = len(options.hosts)
    if peers < 2 or options.steps < 1 or options.bytes < 4 * peers:
        parser.error("needs 2 peers, 1 step and an element for each peer, or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        version = importlib.metadata.version("hivemind")
        seconds, matchmaking = measure(options)
    except importlib.metadata.PackageNotFoundError:
        print(f"error: hivemind is not installed here: {INSTALL}", file=sys.stderr)
        return 1
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if options.json:
        outcome = {
            "version": version,
            "peers": peers,
            "bytes": options.bytes // 4 * 4,
            "seconds": seconds,
            "matchmaking_seconds": matchmaking,
        }
        print(json.dumps(outcome))
    else:
        print(
            f"hivemind {version}, {peers} peers, {options.bytes / 1e6:.1f} MB: median "
            f"{statistics.median(seconds):.3f} s of {len(seconds)} steps, and "
            f"{statistics.median(matchmaking):.3f} s of matchmaking before each"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
