"""One child, tended by hand: when it is started again, what it says, and what is left of a start that failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import until
from kontextd_server.worker import Backoff, ChildSpec, SupervisorPolicy
from kontextd_server.worker.children import Child, Ended, Run

# Whatever ran at all has run longer than `stable_s`.
POLICY = SupervisorPolicy(restart=Backoff(0.01, 0.02), stable_s=1e-6)
READY = """
import os, socket
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
"""
WAIT = "import time; time.sleep(600)"

Tend = Callable[..., Child]


@pytest.fixture
def sockets() -> Iterator[Path]:
    """The path of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def child(sockets: Path) -> Iterator[Tend]:
    made: list[Child] = []

    def make(code: str, silence_s: float | None = None) -> Child:
        command = [sys.executable, "-I", "-S", "-c", code]
        made.append(Child(ChildSpec("w", lambda _: command, silence_s=silence_s), sockets, {}, POLICY))
        return made[-1]

    yield make
    for one in made:
        if one.run is not None:
            one.kill()
            until(one.tend)


def ended(child: Child) -> Ended:
    """How its next run ends."""
    found: list[Ended] = []
    until(lambda: found.extend(filter(None, [child.tend()])) or found)
    return found[0]


def in_a_row(caplog: pytest.LogCaptureFixture) -> list[str]:
    """How many runs had failed, as each end said."""
    ends = [record.getMessage() for record in caplog.records if "ended after" in record.getMessage()]
    return [end.partition(" in a row)")[0].rpartition("(")[2] for end in ends]


# When it is started again.


def test_one_that_dies_again_and_again_before_it_is_ready_starts_later_however_long_it_loads(
    child: Tend, caplog: pytest.LogCaptureFixture
) -> None:
    one = child("raise SystemExit(1)", silence_s=600.0)
    for _ in range(3):
        ended(one)
    assert in_a_row(caplog) == ["1", "2", "3"]


def test_one_that_was_ready_for_long_begins_its_restarts_anew(child: Tend, caplog: pytest.LogCaptureFixture) -> None:
    one = child(READY + WAIT, silence_s=600.0)
    for _ in range(2):
        until(lambda: one.tend() or (one.run is not None and one.run.ready_at is not None))
        one.kill()
        ended(one)
    assert in_a_row(caplog) == ["1", "1"]


def test_the_last_word_of_one_that_ends_is_heard(child: Tend, monkeypatch: pytest.MonkeyPatch) -> None:
    one = child(READY + "raise SystemExit(2)", silence_s=600.0)
    one.tend()
    run = one.run
    assert run is not None
    until(lambda: os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    looks = iter([lambda: None])  # it had not said it yet when we last listened
    monkeypatch.setattr(run, "listen", lambda: next(looks, Run.listen.__get__(run))())
    ended(one)
    assert one.was_ready


def test_where_no_word_is_expected_the_time_counts_from_the_start(
    child: Tend, caplog: pytest.LogCaptureFixture
) -> None:
    one = child("raise SystemExit(1)")
    for _ in range(2):
        ended(one)
    assert in_a_row(caplog) == ["1", "1"]


# What it says.


def test_a_child_that_says_much_goes_on_where_there_is_no_stderr(child: Tend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    one = child("import sys\nfor _ in range(1000):\n    print('x' * 1000, file=sys.stderr)")
    assert ended(one).code == 0


# Starts that fail.


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All that are started."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: object, **words: object) -> None:
            super().__init__(*arguments, **words)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return started


def test_a_child_without_a_thread_to_listen_to_it_is_taken_back_and_started_later(
    child: Tend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sockets: Path,
    processes: list[subprocess.Popen[bytes]],
) -> None:
    one = child(WAIT)
    with monkeypatch.context() as refused:
        refused.setattr(threading.Thread, "start", no_thread)
        one.tend()
    assert one.run is None
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert "cannot be started: can't start new thread; it is started again in" in caplog.text
    assert list(sockets.iterdir()) == []
    until(lambda: one.tend() or one.run is not None)


def test_of_a_command_that_does_not_start_no_socket_is_left(
    child: Tend, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(sockets / "absent"))
    one = child(WAIT)
    one.tend()
    assert one.run is None
    assert list(sockets.iterdir()) == []
