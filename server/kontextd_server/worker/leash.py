"""Runs a command that ends when its parent does: `python leash.py PARENT_PID COMMAND…`. Knows one system call.

The kernel's parent-death signal has to be asked for between fork and exec. `Popen(preexec_fn=…)` does that in a copy of
a process with threads, where any lock may be held for ever; this small program does it in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); kept across exec
EXIT_ORPHANED = 75  # EX_TEMPFAIL of sysexits.h


def leashed(command: list[str]) -> list[str]:
    """The command on a leash. To be started by a thread that lives as long as the process: the kernel watches that."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(EXIT_ORPHANED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
