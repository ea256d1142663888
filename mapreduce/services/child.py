"""A neuron that runs as a child of its supervisor, and the supervisor's end of their channel.

Knows the child's process and the words of `worker.py`; knows nothing of releases, nor when a child
is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from mapreduce.core.versions import Version
from mapreduce.errors import MapReduceError
from mapreduce.processes import ChildProcess, spawn
from mapreduce.services.worker import BUSY, DRAIN, DRAINED, READY, VARIABLE

STOP_S: Final = 20.0

_log = logging.getLogger(__name__)


class NotGood(MapReduceError):
    """A release that runs did not become ready, or did not stay; the message says which."""


@dataclass(frozen=True, slots=True)
class Program:
    """A version of the neuron, and how to run it."""

    version: Version
    argv: tuple[str, ...]
    environ: dict[str, str]


class Child:
    """One run of a program, and the supervisor's end of its channel."""

    def __init__(self, program: Program, process: ChildProcess, channel: socket.socket) -> None:
        self.program = program
        self.version = ""
        self.state: Path | None = None
        self.work = ""
        self.ready = asyncio.Event()
        self.drained = asyncio.Event()
        self.ended: asyncio.Task[int] = asyncio.create_task(self._listen(channel))
        self._process = process
        self._told_to_stop = False
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    def start(cls, program: Program, name: str, listener: socket.socket | None) -> Self:
        """Raises OSError if the system cannot start a process."""
        ours, theirs = socket.socketpair()
        with theirs:
            passed = [theirs.fileno(), *([] if listener is None else [listener.fileno()])]
            env = {**program.environ, VARIABLE: " ".join(map(str, passed))}
            process = spawn(name, program.argv, env=env, log_path=None, pass_fds=passed)
        return cls(program, process, ours)

    @property
    def running(self) -> Version:
        """The version that it says it is, or that it should be: its code may have been pulled."""
        return Version.parse(self.version) if self.ready.is_set() else self.program.version

    async def _listen(self, channel: socket.socket) -> int:
        """Hears the child until it has ended; returns its exit code."""
        reader, self._writer = await asyncio.open_unix_connection(sock=channel)
        with contextlib.suppress(OSError, ValueError):  # a line without an end
            while line := await reader.readline():
                if isinstance(message := json.loads(line), dict):
                    self._hear(message)
        self._writer.close()
        # Only the child had the other end: it is ending, which takes as long as a stop may.
        code = await asyncio.to_thread(self._process.wait, STOP_S)
        return self._process.kill() if code is None else code

    def _hear(self, message: dict[str, Any]) -> None:  # as the child wrote it
        event = message.get("event")
        if event == READY:
            state, self.version = message.get("state"), str(message.get("version"))
            self.state = None if state is None else Path(str(state))
            self.ready.set()
        elif event == BUSY:
            self.work = str(message.get("work"))
        elif event == DRAINED:
            self.drained.set()

    def tell(self, command: str) -> None:
        """Says a word to the child, if it still hears."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps({"command": command}).encode() + b"\n")

    async def wait_ready(self, timeout_s: float) -> None:
        """Raises NotGood if it ends, or does not say so in time."""
        if not await self._first(self.ready, timeout_s):
            how = self._how_it_ended() or f"was not ready after {timeout_s:g} s"
            raise NotGood(f"version {self.program.version} {how}")
        if self.version != str(self.program.version):
            raise NotGood(f"version {self.program.version} runs the code of {self.version}")

    async def wait_proven(self, timeout_s: float) -> None:
        """Raises NotGood if it ends within the time."""
        await asyncio.wait([self.ended], timeout=timeout_s)
        if how := self._how_it_ended():
            raise NotGood(f"version {self.program.version} {how}, soon after it was ready")

    async def wait_drained(self, timeout_s: float) -> bool:
        """Whether nothing is under way any more, or the child has ended by itself."""
        self.drained.clear()
        self.tell(DRAIN)
        return await self._first(self.drained, timeout_s) or self.ended.done()

    async def _first(self, event: asyncio.Event, timeout_s: float) -> bool:
        """Whether the event comes in time and before the end."""
        waiting = asyncio.create_task(event.wait())
        try:
            await asyncio.wait(
                [waiting, self.ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            return event.is_set()
        finally:
            waiting.cancel()

    def _how_it_ended(self) -> str | None:
        if not self.ended.done():
            return None
        code = self.ended.result()
        return f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"

    async def stop(self, grace_s: float = STOP_S) -> int:
        """SIGTERM, and SIGKILL for what does not end in time; returns the exit code."""
        if not self._told_to_stop:  # a second one would cut its stop short
            self._told_to_stop = True
            self._process.send_signal(signal.SIGTERM)
        await asyncio.wait([self.ended], timeout=grace_s)
        if not self.ended.done():
            _log.warning("the neuron does not stop: it is killed")
            self._process.kill()
        return await asyncio.shield(self.ended)

    def kill(self) -> None:
        self._process.kill()
