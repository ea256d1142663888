"""`python launcher.py PARENT_PID COMMAND...`: become COMMAND, tied to the life of the parent.

Run by path with `-I -S`, so it starts in some 10 ms and needs no package. Knows Linux's parent
death signal; knows nothing of logs, groups or stopping (`processes.py`).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Replace this process by the command; returns an exit code only where that is impossible."""
    parent_pid, command = int(argv[0]), argv[1:]
    if sys.platform == "linux":
        # The kernel sends SIGKILL when the *thread* that forked us ends. exec keeps the setting.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        return 1
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
