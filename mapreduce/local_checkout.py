"""What a local subnet can do only in a checkout of the repository: parties that lie, and links of a
given rate.

Both live under `test/`, with their own entry points. Knows how they are named and started; knows
nothing of the subnet.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

from mapreduce.errors import InvalidArgument
from mapreduce.processes import ChildProcess, spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LIARS: Final = "test.liars"
LIMITS: Final = "test.limits"
LINK_TIMEOUT_S: Final = 30.0


def check_faults(faults: Mapping[str, str], miners: int) -> None:
    """Raises InvalidArgument for a party or a fault that does not exist."""
    if not faults:
        return
    known = _checkout(LIARS, "faults").FAULTS
    for name, fault in faults.items():
        role = _role(name, "faults", miners, ("miner", "peer"))
        if fault not in known or known[fault].by != role:
            names = ", ".join(sorted(key for key, value in known.items() if value.by == role))
            raise InvalidArgument(f"faults: a {role} cannot do {fault!r}; it can do {names}")


def check_limits(limits: Mapping[str, float], miners: int) -> None:
    """Raises InvalidArgument for a miner that does not exist, or for what is no rate."""
    if not limits:
        return
    _checkout(LIMITS, "limits")
    for name, bits_per_s in limits.items():
        _role(name, "limits", miners, ("miner",))
        if not 0 < bits_per_s < float("inf"):
            raise InvalidArgument(f"limits: {name}: {bits_per_s!r} is no rate in bits per second")


def lying_miner(fault: str) -> tuple[str, ...]:
    """What Python runs as a miner with this fault."""
    return ("-m", f"{LIARS}.miners", fault)


def become_liar(fault: str) -> None:
    """Makes every peer of this process one with this fault."""
    importlib.import_module(f"{LIARS}.peers").install(fault)


def open_link(
    name: str, prefix: Sequence[str], ip: str, port: int, bits_per_s: float, log_path: Path
) -> tuple[ChildProcess, int]:
    """Starts the link in front of what will listen on `port`; returns it, and the port that it
    listens on itself."""
    route = (ip, ip, str(port), f"{bits_per_s:g}")
    link = spawn(name, [*prefix, sys.executable, "-m", LIMITS, *route], log_path=log_path)

    def said() -> list[str]:
        """The link's first line, once it is complete: "ready", and the port."""
        return log_path.read_text().split("\n", 1)[:-1]

    link.wait_ready(lambda: bool(said()) and said()[0].startswith("ready"), LINK_TIMEOUT_S)
    return link, int(said()[0].split()[1])


def _checkout(module: str, what: str) -> Any:
    """A module of `test`; what is in it depends on which one it is."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InvalidArgument(
            f"{what} need {module}, which the installed package does not contain: run it in a "
            "checkout of the repository"
        ) from None


def _role(name: str, what: str, miners: int, roles: tuple[str, ...]) -> str:
    """The role in a name such as "miner-2". Raises InvalidArgument if there is no such party."""
    role, _, number = name.partition("-")
    counts = number.isdecimal() and int(number) >= 1
    if not counts or role not in roles or (role == "miner" and int(number) > miners):
        raise InvalidArgument(f"{what}: there is no {name!r}")
    return role
