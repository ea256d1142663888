"""Real child processes: their end, our end, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from mapreduce.processes import (
    LAUNCHER,
    ProcessDied,
    ProcessNotReady,
    free_port,
    free_ports,
    spawn,
    stop_all,
)

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
# Starts a process of its own in the same group and names it.
WITH_HELPER = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {STUBBORN!r}]).pid, flush=True)
import time; time.sleep(60)
"""
PARENT = """
import os, pathlib, sys, time
from mapreduce.processes import spawn
log = pathlib.Path(sys.argv[1])
child = spawn("child", [sys.executable, "-S", "-c", {code!r}], log_path=log)
child.wait_ready(lambda: "up" in log.read_text(), 5)
print(child.pid, flush=True)
{then}
"""


def python(code, log_path, name="child"):
    return spawn(name, [sys.executable, "-S", "-c", code], log_path=log_path)


def says(child, text="up"):
    return lambda: text in child.log_path.read_text()


def eventually(condition, timeout_s=2.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody may reap an orphan
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def parent(log_path, then, code=SLEEP):
    """Another process that starts a child; gives its Popen and the child's pid."""
    script = PARENT.format(code=code, then=then)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(log_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        child_pid = int(process.stdout.readline())
        try:
            yield process, child_pid
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child_pid, signal.SIGKILL)


@pytest.fixture
def log_path(tmp_path):
    return tmp_path / "logs" / "child.log"


# Our end.


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a SIGKILL")
@pytest.mark.parametrize("code", [SLEEP, STUBBORN])
def test_a_child_dies_with_a_parent_that_is_killed(log_path, code):
    with parent(log_path, "time.sleep(60)", code) as (process, child_pid):
        assert not is_gone(child_pid)
        process.send_signal(signal.SIGKILL)
        assert eventually(lambda: is_gone(child_pid))


@pytest.mark.parametrize("then", ["", "raise SystemExit(1)", "1 / 0"])
def test_a_child_dies_with_a_parent_that_forgets_it(log_path, then, capfd):
    with parent(log_path, then) as (process, child_pid):
        process.wait(5)
        assert eventually(lambda: is_gone(child_pid))


def test_what_a_child_started_dies_with_a_parent_that_ends(log_path):
    with parent(log_path, "", WITH_HELPER) as (process, _):
        helper_pid = int(log_path.read_text().split()[0])
        process.wait(5)
        assert eventually(lambda: is_gone(helper_pid))


def test_a_child_outlives_the_thread_that_started_it(log_path):
    started = []

    def start():
        started.append(python(SLEEP, log_path))
        started[0].wait_ready(says(started[0]), 2)  # by now it has asked for the death signal

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with started[0] as child:
        assert child.wait(0.1) is None
    assert child.exit_code == -signal.SIGTERM


def test_a_forked_process_can_start_children_of_its_own(log_path):
    fork = """
import signal
is_fork = os.fork() == 0
signal.alarm(2)  # a fork that waits for a thread it does not have would wait for ever
if is_fork:
    with spawn("own", [sys.executable, "-S", "-c", "import time; time.sleep(60)"], log_path=log):
        print("started", flush=True)
    sys.exit()  # runs the exit handlers, which must not touch the parent's child
print("fork ended with", os.wait()[1], "child", child.exit_code, flush=True)
"""
    with parent(log_path, fork) as (process, _):
        assert process.stdout.read().split("\n")[:2] == [
            "started",
            "fork ended with 0 child None",
        ]


def test_the_launcher_starts_nothing_for_a_parent_that_is_gone(tmp_path):
    command = [sys.executable, "-I", "-S", LAUNCHER, "1", "touch", tmp_path / "ran"]
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "ran").exists()


# A child's end.


def test_a_child_that_dies_at_start_is_reported_with_its_last_words(log_path):
    child = python("import sys; print('one\\n\\ntwo'); sys.exit(3)", log_path, name="miner 2")
    with pytest.raises(ProcessDied) as caught:
        child.wait_ready(lambda: False, 2)
    error = caught.value
    assert (error.name, error.exit_code, error.last_lines) == ("miner 2", 3, ("one", "two"))
    assert str(error) == "miner 2 died: exit code 3\n  | one\n  | two"


def test_a_check_that_somebody_else_answers_does_not_hide_a_death(log_path):
    child = python("raise SystemExit(1)", log_path)
    assert eventually(lambda: child.exit_code is not None)
    with pytest.raises(ProcessDied, match="it wrote nothing"):
        child.wait_ready(lambda: True, 2)


def test_a_command_that_does_not_exist_is_named(log_path):
    child = spawn("bot", ["no-such-command"], log_path=log_path)
    with pytest.raises(ProcessDied, match="cannot run no-such-command") as caught:
        child.wait_ready(lambda: False, 2)
    assert caught.value.exit_code == 127


def test_a_signal_is_named_and_earlier_runs_are_not_quoted(log_path):
    for word in ("first", "second"):
        child = python(f"print('{word}', flush=True); {SLEEP}", log_path)
        child.wait_ready(lambda word=word: word in log_path.read_text(), 2)
        assert child.kill() == -signal.SIGKILL
    with pytest.raises(ProcessDied, match=r"-9 \(SIGKILL\)") as caught:
        child.check_alive()
    assert "second" in caught.value.last_lines
    assert "first" not in caught.value.last_lines


def test_only_the_end_of_a_long_log_is_quoted(log_path):
    child = python("print('x' * 100_000); print('\\xff end')", log_path)
    assert eventually(lambda: child.exit_code is not None)
    *_, last = child.last_lines()
    assert last.endswith("end")
    assert sum(map(len, child.last_lines())) <= 8192


def test_not_ready_in_time(log_path):
    def refused():
        raise ConnectionRefusedError

    with python(SLEEP, log_path) as child:
        child.wait_ready(says(child), 2)
        with pytest.raises(ProcessNotReady, match=r"child was not ready after 0\.05 s\n  \| up"):
            child.wait_ready(refused, 0.05)
        assert child.exit_code is None


# Stopping.


def test_stopping_twice_is_stopping_once(log_path):
    child = python(SLEEP, log_path)
    child.wait_ready(says(child), 2)
    assert child.stop() == -signal.SIGTERM
    child.send_signal(signal.SIGTERM)
    assert child.stop() == child.kill() == -signal.SIGTERM


def test_a_child_may_end_in_its_own_way(log_path):
    code = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); {SLEEP}"
    child = python(code, log_path)
    child.wait_ready(says(child), 2)
    assert child.stop() == 7


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(log_path):
    child = python(STUBBORN, log_path)
    child.wait_ready(says(child), 2)
    assert child.stop(grace_s=0.15) == -signal.SIGKILL


@pytest.mark.parametrize("end", ["stop", "kill", "its own"])
def test_what_a_child_leaves_in_its_group_is_killed_too(log_path, end):
    child = python(WITH_HELPER, log_path)
    child.wait_ready(says(child), 2)
    helper_pid = int(log_path.read_text().split()[0])
    if end == "its own":
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(2) == -signal.SIGTERM
    else:
        getattr(child, end)()
    assert eventually(lambda: is_gone(helper_pid))


def test_many_are_stopped_together(tmp_path):
    children = [python(STUBBORN, tmp_path / f"{n}.log") for n in range(4)]
    for child in children:
        child.wait_ready(says(child), 2)
    assert stop_all(children, grace_s=0.2) == [-signal.SIGKILL] * 4


def test_nothing_is_left_open_and_no_zombie(log_path):
    python("", log_path).stop()  # the thread that starts children exists from here on
    process = psutil.Process()
    before = process.num_fds(), process.num_threads(), process.children()
    for code in (SLEEP, "", SLEEP):
        child = python(code, log_path)
        child.stop()
    spawn("none", ["no-such-command"], log_path=log_path).wait(2)
    assert (process.num_fds(), process.num_threads(), process.children()) == before


# What a child is given.


def test_a_child_gets_the_environment_and_a_session_of_its_own(log_path):
    code = "import os; print(os.environ['WORD'], os.getsid(0) == os.getpgrp() == os.getpid())"
    child = spawn(
        "c", [sys.executable, "-c", code], env={**os.environ, "WORD": "x"}, log_path=log_path
    )
    assert child.wait(2) == 0
    assert child.last_lines() == ["x True"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ignores_none_of_the_signals_that_python_ignores(log_path):
    child = spawn("c", ["grep", "SigIgn", "/proc/self/status"], log_path=log_path)
    assert child.wait(2) == 0
    ignored = int(child.last_lines()[0].split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert not ignored & (1 << (number - 1))


def test_free_ports_differ_and_can_be_bound():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in (*ports, free_port()):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
