"""Child processes that are watched, stopped in order, and never outlive this process.

On Linux a child dies with us even when we are killed with SIGKILL: the kernel sees to it (see
`launcher.py`). It does so when the *thread* that started the child ends, so all children are
started by one thread that lives as long as the process. On other systems (macOS: from Python 3.13)
a child survives a SIGKILL of its parent, but no ordinary end; on all of them that one case spares
what the child has started itself. Knows processes, groups and logs; knows nothing of miners.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

LAUNCHER = Path(__file__).with_name("launcher.py")
POLL_INTERVAL_S = 0.01
TAIL_BYTES = 8192
TAIL_LINES = 12


class ProcessDied(LocalError):
    """A child ended by itself; `exit_code` is negative for a signal, as in `subprocess`."""

    def __init__(self, name: str, exit_code: int, last_lines: Sequence[str]) -> None:
        super().__init__(f"{name} died: {_describe(exit_code)}{_quoted(last_lines)}")
        self.name = name
        self.exit_code = exit_code
        self.last_lines = tuple(last_lines)


class ProcessNotReady(LocalError):
    """A child runs but did not become ready in time."""

    def __init__(self, name: str, seconds: float, last_lines: Sequence[str]) -> None:
        super().__init__(f"{name} was not ready after {seconds:g} s{_quoted(last_lines)}")
        self.name = name
        self.seconds = seconds
        self.last_lines = tuple(last_lines)


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_path: Path | None,
    pass_fds: Sequence[int] = (),
) -> ChildProcess:
    """Start `argv` in a session of its own, its output appended to `log_path`; None: it writes to
    where this process does. It inherits the descriptors `pass_fds`.

    `env` replaces the environment; None passes ours on. A command that does not exist shows as a
    `ProcessDied` with exit code 127. May be called from any thread.

    Raises:
        OSError: the log cannot be opened, or the system cannot start a process.
    """
    with contextlib.ExitStack() as stack:
        log, log_start = None, 0
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(log_path.open("ab"))
            log_start = log.tell()
        popen = _start(
            lambda: subprocess.Popen(
                tied_to_this_process(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        )
    return ChildProcess(name, popen, log_path, log_start)


def tied_to_this_process(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in a process that dies with the thread that starts it."""
    return [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *argv]


class ChildProcess:
    """One running child, made by `spawn`. Safe to use from several threads.

    What the child leaves behind in its process group is killed when its end is noticed: by
    `exit_code`, `wait_ready`, `check_alive` or `stop`.
    """

    def __init__(
        self, name: str, popen: subprocess.Popen[bytes], log_path: Path | None, log_start: int
    ) -> None:
        self.name = name
        self.pid = popen.pid
        self.log_path = log_path
        self._popen = popen
        self._log_start = log_start
        self._lock = threading.Lock()
        _living.add(self)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N when signal N ended it."""
        with self._lock:
            if self._popen.returncode is None and _has_ended(self.pid):
                # Before it is reaped: until then nobody else can be given its number.
                self._signal_group(signal.SIGKILL)
                self._popen.wait()
                _living.discard(self)
            return self._popen.returncode

    def check_alive(self) -> None:
        """Raises `ProcessDied` if it has ended."""
        code = self.exit_code
        if code is not None:
            raise ProcessDied(self.name, code, self.last_lines())

    def wait_ready(self, check: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Return as soon as `check()` is true; an `OSError` from it (refused, say) means not yet.

        Raises:
            ProcessDied: it ended first.
            ProcessNotReady: neither happened within `timeout_s` seconds.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            ready = False
            with contextlib.suppress(OSError):
                ready = check()
            self.check_alive()  # after the check: somebody else may have answered it
            if ready:
                return
            if time.monotonic() >= deadline_s:
                raise ProcessNotReady(self.name, timeout_s, self.last_lines())
            time.sleep(POLL_INTERVAL_S)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it still runs after `timeout_s` seconds."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.exit_code) is None and time.monotonic() < deadline_s:
            time.sleep(POLL_INTERVAL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the child alone; nothing happens when it has ended."""
        with self._lock:
            if self._popen.returncode is None:  # not reaped, so the number is still its own
                os.kill(self.pid, number)

    def stop(self, grace_s: float = 5.0) -> int:
        """SIGTERM, after `grace_s` seconds SIGKILL for its whole group; returns the exit code.

        Calling again changes nothing.
        """
        return stop_all([self], grace_s)[0]

    def kill(self) -> int:
        """SIGKILL for the whole group at once; returns the exit code."""
        with self._lock:
            if self._popen.returncode is None:
                self._signal_group(signal.SIGKILL)
                self._popen.wait()
                _living.discard(self)
            return self._popen.returncode

    def last_lines(self, count: int = TAIL_LINES) -> list[str]:
        """The end of what it has written to its log since it was started."""
        if self.log_path is None:
            return []
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:  # removed meanwhile
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: only a zombie left
            os.killpg(self.pid, number)


def stop_all(children: Iterable[ChildProcess], grace_s: float = 5.0) -> list[int]:
    """Stop children at the same time, sharing one grace period; returns their exit codes."""
    children = list(children)
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    codes = []
    for child in children:
        code = child.wait(max(0.0, deadline_s - time.monotonic()))
        codes.append(child.kill() if code is None else code)
    return codes


def free_ports(count: int, ip: str = "127.0.0.1") -> list[int]:
    """`count` different TCP ports that are free now.

    Nothing reserves them: another process, or an outgoing connection, may take one before it is
    used. A server that finds its port taken says so and dies, so start it again with another one;
    where a server can report the port it was given, let it listen on port 0 instead.
    """
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):  # all held until the last is found, so that they differ
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind((ip, 0))
            ports.append(int(listener.getsockname()[1]))
        return ports


def free_port(ip: str = "127.0.0.1") -> int:
    """A TCP port that is free now; for how long, see `free_ports`."""
    return free_ports(1, ip)[0]


def _has_ended(pid: int) -> bool:
    """Whether our child has ended; does not reap it."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, flags) is not None


def _describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"exit code {exit_code} ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"exit code {exit_code}"


def _quoted(lines: Sequence[str]) -> str:
    return "".join(f"\n  | {line}" for line in lines) if lines else "; it wrote nothing"


# The one thread that starts children, and what must happen at exit and after a fork.

_Start = tuple["Callable[[], subprocess.Popen[bytes]]", "Future[subprocess.Popen[bytes]]"]

_living: set[ChildProcess] = set()
_starter_lock = threading.Lock()
_starts: queue.SimpleQueue[_Start] | None = None


def _start(popen: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    global _starts
    with _starter_lock:
        if _starts is None:
            _starts = queue.SimpleQueue()
            # A daemon: it must outlive even the exit handlers, which may stop children in order.
            threading.Thread(
                target=_serve_starts, args=(_starts,), name="process starter", daemon=True
            ).start()
        future: Future[subprocess.Popen[bytes]] = Future()
        _starts.put((popen, future))
    return future.result()


def _serve_starts(starts: queue.SimpleQueue[_Start]) -> None:
    while True:
        popen, future = starts.get()
        try:
            future.set_result(popen())
        except BaseException as error:  # carried to the thread that asked
            future.set_exception(error)
        del popen, future  # or the last Popen would be kept alive until the next start


def _kill_the_living() -> None:
    for child in list(_living):
        child.kill()


def _forget_after_fork() -> None:
    global _starts, _starter_lock
    _starts = None  # its thread exists in the parent only
    _starter_lock = threading.Lock()
    _living.clear()  # they are the parent's: our exit must not kill them


atexit.register(_kill_the_living)
os.register_at_fork(after_in_child=_forget_after_fork)
