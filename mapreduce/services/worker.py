"""The neuron's end of the channel to the supervisor that started it (`supervisor.py`).

Through it go a few words only, since the two ends may be of different versions: the neuron says
that it is ready and that nothing of it is under way; the supervisor says when to take on nothing
new. Knows these words and the environment variable that brings the channel; knows nothing of
updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from typing import TYPE_CHECKING, Final, Protocol, Self

from mapreduce import __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
    from pathlib import Path

VARIABLE: Final = "MAPREDUCE_WORKER"
"""Set by the supervisor: the descriptor of the channel, and that of the socket to listen on."""
READY: Final = "ready"
DRAINED: Final = "drained"
BUSY: Final = "busy"
DRAIN: Final = "drain"
RESUME: Final = "resume"
LOOK_INTERVAL_S: Final = 0.05

_log = logging.getLogger(__name__)


class Duty(Protocol):
    """A part of a neuron with work that must not be cut off."""

    draining: bool
    """Set from outside: take on nothing new."""

    def under_way(self) -> str | None:
        """What it is in the middle of, in words; None if nothing would be lost."""


class Worker:
    """A neuron that a supervisor watches over. `listener` is the socket to listen on, None for a
    bot."""

    def __init__(self, channel: socket.socket, listener: socket.socket | None) -> None:
        self.listener = listener
        self._channel = channel
        self._writer: asyncio.StreamWriter | None = None
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Self | None:
        """What the supervisor has left for this process, taken out of the environment so that no
        child of ours believes it to be its own; None without a supervisor."""
        words = environ.pop(VARIABLE, "").split()
        if not words:
            return None
        sockets = [socket.socket(fileno=int(word)) for word in words]
        for one in sockets:
            one.set_inheritable(False)  # they came through exec, and shall go no further
        return cls(sockets[0], sockets[1] if len(sockets) > 1 else None)

    async def run(
        self, duties: Sequence[Duty], stop: Callable[[], None], state: Path | None
    ) -> None:
        """Says that this neuron is ready (`state` is the file it keeps), and does what the
        supervisor says until it is gone; then calls `stop`."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel)
        self._tell(READY, version=__version__, state=None if state is None else str(state))
        try:
            while line := await reader.readline():
                self._obey(line, duties)
            _log.warning("the supervisor is gone")
        except (OSError, ValueError):  # a line without an end
            _log.warning("the channel to the supervisor is broken")
        finally:
            if self._draining is not None:
                self._draining.cancel()
            self._writer.close()
        stop()

    def _tell(self, event: str, **facts: object) -> None:
        line = json.dumps({"event": event, **facts}) + "\n"
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(line.encode())

    def _obey(self, line: bytes, duties: Sequence[Duty]) -> None:
        message = json.loads(line)
        command = message.get("command") if isinstance(message, dict) else None
        if command not in (DRAIN, RESUME):
            return  # a word of a newer supervisor
        if self._draining is not None:
            self._draining.cancel()
        for duty in duties:
            duty.draining = command == DRAIN
        self._draining = asyncio.create_task(self._drain(duties)) if command == DRAIN else None

    async def _drain(self, duties: Sequence[Duty]) -> None:
        told = None
        while what := [text for duty in duties if (text := duty.under_way()) is not None]:
            if what != told:
                self._tell(BUSY, work=", ".join(what))
                told = what
            await asyncio.sleep(LOOK_INTERVAL_S)
        self._tell(DRAINED)


@contextlib.asynccontextmanager
async def supervised(
    worker: Worker | None, duties: Sequence[Duty], stop: Callable[[], None], state: Path | None
) -> AsyncIterator[None]:
    """A neuron that is ready, and obeys its supervisor, if it has one, while the context lasts."""
    if worker is None:
        yield
        return
    obeying = asyncio.create_task(worker.run(duties, stop, state))
    try:
        yield
    finally:
        obeying.cancel()
        await asyncio.wait([obeying])
