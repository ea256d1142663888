"""Machines in one machine: network namespaces on a bridge, each behind a link of a given rate.

Knows `ip`, `tc` and `unshare`; knows nothing of tensors. The whole laboratory lives in a network
and a mount namespace of its own, which the kernel removes with the last process in them: after
Ctrl+C or a crash too there is nothing to clean up.

A link is shaped by `tbf` on both ends of its veth pair, so upload and download have the same rate.
The bridge itself, where the driver and the validator are, is not shaped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

BURST = "128kb"  # below two GSO packets tbf drops them whole
LATENCY = "40ms"  # what may wait in the queue of a link
_MARK = "MAPREDUCE_BENCH_LAB"
_NAMES = "/run/netns"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class Host:
    """Where a process runs: an address, and the namespace it is in (None: the driver's own)."""

    ip: str
    namespace: str | None = None

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command line."""
        return () if self.namespace is None else ("ip", "netns", "exec", self.namespace)

    @property
    def interface(self) -> str:
        """The network interface that has the address."""
        return "lo" if self.ip.startswith("127.") else "br0" if self.namespace is None else "eth0"

    def enter(self) -> None:
        """Moves the calling thread, and the threads it will start, to this host."""
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 only
        with open(f"{_NAMES}/{self.namespace}", "rb") as handle:
            if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")


@dataclass(frozen=True, slots=True)
class Site:
    """Who runs where; on `driver` the validator, and whatever else has no link of its own."""

    driver: Host
    peers: tuple[Host, ...]
    miners: tuple[Host, ...]


LOOPBACK = Host("127.0.0.1")


def on_loopback(peers: int, miners: int) -> Site:
    return Site(LOOPBACK, (LOOPBACK,) * peers, (LOOPBACK,) * miners)


class Lab:
    """A bridge with hosts on it."""

    driver = Host("10.90.0.1")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        _run("ip link set lo up")
        _run("ip link add br0 type bridge")
        _run(f"ip addr add {self.driver.ip}/16 dev br0")
        _run("ip link set br0 up")

    def build(self, peers: Sequence[float], miners: Sequence[float]) -> Site:
        """A host for each peer and each miner, behind a link of so many Mbit/s."""
        return Site(
            self.driver,
            tuple(self._add(rate) for rate in peers),
            tuple(self._add(rate) for rate in miners),
        )

    def _add(self, mbit_per_s: float) -> Host:
        """A new host behind a link of this rate in each direction."""
        number = len(self._numbers) + 1
        host = host_of(number)
        self._numbers.append(number)
        inside = f"ip netns exec {host.namespace}"
        _run(f"ip netns add {host.namespace}")
        _run(f"ip link add v{number} type veth peer name eth0 netns {host.namespace}")
        _run(f"ip link set v{number} master br0 up")
        _run(f"{inside} ip link set lo up")
        _run(f"{inside} ip addr add {host.ip}/16 dev eth0")
        _run(f"{inside} ip link set eth0 up")
        shape = f"root tbf rate {mbit_per_s:g}mbit burst {BURST} latency {LATENCY}"
        _run(f"tc qdisc add dev v{number} {shape}")
        _run(f"{inside} tc qdisc add dev eth0 {shape}")
        return host

    def clear(self) -> None:
        """Removes all hosts."""
        for number in self._numbers:
            # The kernel frees a namespace's links some time after its name: the next host of this
            # number would find its own taken.
            _run(f"ip link del v{number}")
            _run(f"ip netns del {host_of(number).namespace}")
        self._numbers.clear()


def host_of(number: int) -> Host:
    """The lab's host number 1, 2, .. 254, each in a /24 of its own: neighbours share their pay."""
    return Host(f"10.90.{number}.1", f"h{number}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.stderr.strip()}")


def enter_laboratory() -> None:
    """Starts this program anew in namespaces of its own, unless it is in them already.

    Exits with a message if that is not possible here.
    """
    if os.environ.get(_MARK) == str(os.getpid()):
        os.makedirs(_NAMES, exist_ok=True)
        _run(f"mount -t tmpfs none {_NAMES}")  # its names are seen by nobody else
        return
    if os.geteuid() != 0:
        raise SystemExit("the shaped laboratory needs root: run `sudo make bench-shaped`")
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)} (packages util-linux, iproute2)")
    _start_anew()


def _start_anew() -> NoReturn:
    environment = os.environ | {_MARK: str(os.getpid())}  # exec keeps the process's number
    command = ["unshare", "--net", "--mount", "--", sys.executable, *sys.orig_argv[1:]]
    os.execvpe(command[0], command, environment)
