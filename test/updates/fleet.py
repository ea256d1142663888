"""A local subnet whose neurons run from an operator's checkout and update themselves.

Knows how they are started and what they log; knows nothing of what is asserted.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from mapreduce.local import LocalSubnet
from test.updates.repository import Repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mapreduce.processes import ChildProcess

POLL_S = 0.05


class UpdatingSubnet(LocalSubnet):
    """`updating` names the neurons that run from the checkout at `directory`; all others run what
    is under test. `level` is their auto_update; `fast`: releases are installed without pip."""

    def __init__(
        self,
        directory: Path,
        updating: Mapping[str, str],
        *,
        fast: bool = True,
        flags: tuple[str, ...] = ("--auto_update.every", "0.5", "--auto_update.delay", "0"),
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.origin = Repository(directory / "origin")
        self.checkout = self.origin.clone(directory / "checkout")
        self._updating = updating
        self._fast = fast
        self._update_flags = flags
        # The checkout comes before what is installed here; a release must not notice.
        self._environ = {"PYTHONPATH": str(self.checkout), **(environ or {})}
        super().__init__(directory=directory / "subnet", **options)

    def restart_miner(self, number: int = 1) -> None:
        """Starts a miner again that has ended, with its flags."""
        self.miners[number - 1] = self._serving("miner", f"miner-{number}", self._miner_flags)

    def _spawn(self, role: str, name: str, flags: Sequence[str]) -> ChildProcess:
        before = {key: os.environ.get(key) for key in self._environ}
        os.environ.update(self._environ)
        try:
            return super()._spawn(role, name, flags)
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value

    def program(self, role: str, name: str) -> tuple[str, ...]:
        """What Python runs as this neuron."""
        if name not in self._updating:
            return super().program(role, name)
        if self._fast:
            program: tuple[str, ...] = (str(self.checkout / "test" / "updates" / "neuron.py"), role)
        else:
            program = (str(self.checkout / "neurons" / f"{role}.py"),)
        return (*program, "--auto_update", self._updating[name], *self._update_flags)

    def log(self, name: str) -> str:
        """What this neuron and its supervisor have written."""
        return (self.directory / f"{name}.log").read_text()

    def wait_log(self, name: str, text: str, timeout_s: float = 60.0, count: int = 1) -> str:
        """The log, once it holds the text so many times."""
        deadline = time.monotonic() + timeout_s
        while (log := self.log(name)).count(text) < count:
            assert time.monotonic() < deadline, f"{name} does not say {text!r}:\n{log[-6000:]}"
            self.check()
            time.sleep(POLL_S)
        return log

    def installed(self) -> list[str]:
        """The releases that have an environment in the checkout."""
        releases = self.checkout / ".releases"
        return sorted(path.name for path in releases.iterdir() if path.is_dir())


def descendants() -> list[str]:
    """The command lines of all processes that this one, or one of its children, has started."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:  # ended meanwhile
            continue
    return [line for line in lines if (line and sys.executable in line) or ".releases" in line]
