"""`kontextd` commands in processes of their own, and what they say. Knows processes; knows no jobs, no HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

WAIT_S = 180.0  # a test never waits longer for anything: a busy machine takes ten times as long
SCRIPTED = (str(Path(__file__).with_name("scripted.py")),)
REAL = ("-m", "kontextd_server.cli")
_STARTED = re.compile(r" (\S+)-[0-9a-f]{8} started as process (\d+)$", re.M)
_T = TypeVar("_T")


def until(condition: Callable[[], _T], what: str, pause_s: float = 0.02, at_most_s: float = WAIT_S) -> _T:
    """Wait for a condition; returns what made it true."""
    deadline = time.monotonic() + at_most_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause_s)
    return found


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Ours without what is set of kontextd, and with these settings, by the names of their fields."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("KONTEXTD_")}
    given = {f"KONTEXTD_{name.upper()}": text for name, text in settings.items()}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **given}


def free_port() -> int:
    """One that the system gives to nobody who does not ask for it: it stays free while its server is away."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Running:
    """One command. What it says goes to files, where it can be read at any time."""

    def __init__(self, program: Sequence[str], arguments: Sequence[str], settings: Mapping[str, str], said: Path):
        self._out, self._err = said.with_suffix(".out"), said.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def printed(self) -> str:
        return self._out.read_text()

    @property
    def logged(self) -> str:
        """Its log, with that of the processes it started."""
        return self._err.read_text()

    def pids(self, name: str) -> list[int]:
        """Of all runs of a child, the latest last."""
        return [int(pid) for child, pid in _STARTED.findall(self.logged) if child == name]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def freeze(self, database: Path) -> None:
        """Stops it, but not while it holds SQLite's lock for writing, which would stop all others as well."""
        while True:
            self.send(signal.SIGSTOP)
            until(lambda: _threads_of(self.pid) == {"T"}, "it to stop")
            if _can_be_written(database):
                return
            self.send(signal.SIGCONT)

    def exit_code(self) -> int:
        """Once it has ended."""
        return self.process.wait(WAIT_S)

    def end(self) -> int:
        """As an operator would who knows that a second signal ends it at once."""
        for patience_s in (60.0, 30.0):
            if self.process.poll() is None:
                self.send(signal.SIGCONT)
                self.send(signal.SIGTERM)
            try:
                return self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
        return self.kill()

    def kill(self) -> int:
        self.process.kill()
        return self.process.wait()


def _threads_of(pid: int) -> set[str]:
    """The states of its threads, in the letters of proc(5)."""
    return {task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")}


def _can_be_written(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database, timeout=0.5, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
    return True
