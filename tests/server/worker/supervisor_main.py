"""A supervisor in a process of its own, for the tests: it keeps one command running."""

from __future__ import annotations

import os
import sys

from kontextd_server.worker import ChildSpec, SupervisorPolicy, supervise


def run(command: list[str], stderr: str = os.devnull) -> None:
    """The target of a process. What children say goes to the file `stderr`."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    sys.exit(supervise([ChildSpec("child", lambda _: command)], [], print, os.environ, SupervisorPolicy(stop_s=5.0)))
