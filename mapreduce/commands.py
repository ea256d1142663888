"""Running the commands of others: bounded in time and output, and with nothing left behind.

Knows processes and pipes; knows no command. Children of ours that are to live as long as this
process are in `processes.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from mapreduce.errors import Unavailable
from mapreduce.processes import tied_to_this_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REAP_S = 5.0  # the kernel needs no time, unless a process hangs in it
STDERR_BYTES = 8192


class CommandFailed(Unavailable):
    """A command could not be run, or did not end well; the message has its last words."""


class CommandTimedOut(CommandFailed):
    """A command took too long, which may be this machine's fault."""


async def run_command(
    name: str,
    argv: Sequence[str],
    *,
    timeout_s: float,
    most_bytes: int,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """What a command prints, at most `most_bytes`. However this ends, nothing that it has started
    in its process group runs on; it dies with this process too. `name` is how errors call it.

    Raises CommandFailed if it fails, with the last line of its stderr, prints more, takes longer or
    cannot be run.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *tied_to_this_process(argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        raise CommandFailed(f"{name} cannot be run: {error.strerror}") from None
    assert process.stdout is not None
    assert process.stderr is not None
    ended = False
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as readers:
            output = readers.create_task(_head(process.stdout, most_bytes + 1))
            errors = readers.create_task(_tail(process.stderr, STDERR_BYTES))
            code = await process.wait()
        ended = True  # nobody holds its pipes any more
    except TimeoutError:
        raise CommandTimedOut(f"{name} was stopped: not done after {timeout_s:g} s") from None
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REAP_S):
                    await process.wait()
    if len(output.result()) > most_bytes:
        raise CommandFailed(f"{name} printed more than {most_bytes} bytes")
    if code != 0:
        lines = errors.result().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        raise CommandFailed(f"{name} failed: {last.strip()}")
    return output.result()


async def _head(stream: asyncio.StreamReader, most_bytes: int) -> bytes:
    """The first bytes of a stream; reads on to its end, so that its writer can end too."""
    head = b""
    while data := await stream.read(4096):
        head += data[: most_bytes - len(head)]
    return head


async def _tail(stream: asyncio.StreamReader, most_bytes: int) -> bytes:
    """The last bytes of a stream."""
    tail = b""
    while data := await stream.read(4096):
        tail = (tail + data)[-most_bytes:]
    return tail
