"""`kontextd serve` without a terminal, or in one that closes: streams that nobody reads or that are closed, SIGHUP."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx
import pytest
from kontextd_server.store import JobState, Outcome, WorkerState

from .box import Box, NewBox
from .processes import SCRIPTED, Running, free_port, until
from .test_serving import assert_nothing_is_left

BROKEN_PIPE = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
FULL_DISK = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
CLOSED = "[os.close(number) for number in range(3)]"


def after(code: str) -> tuple[str, ...]:
    """The scripted program, in a process that has done this first."""
    return "-c", f"import os, signal, sys; {code}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])", *SCRIPTED


def at_hangup(action: str) -> tuple[str, ...]:
    """Whoever runs the tests may ignore it."""
    return after(f"signal.signal(signal.SIGHUP, signal.{action})")


def answers(box: Box) -> bool:
    try:
        return httpx.get(f"{box.url}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


def has_ended(run: Running) -> bool:
    return run.process.poll() is not None


def served_in_silence(box: Box, code: str) -> Running:
    port = free_port()
    box.url = f"http://127.0.0.1:{port}"
    return box.command("serve", "--port", str(port), "--workers", "0", program=after(code))


# Streams.


@pytest.mark.parametrize("code", [BROKEN_PIPE, FULL_DISK], ids=["the reader went away", "full disk"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_server_that_cannot_say_that_it_is_ready_logs_it_and_goes_on(
    new_box: NewBox, code: str, unbuffered: str
) -> None:
    box = new_box()
    run = served_in_silence(box, f"os.environ['PYTHONUNBUFFERED'] = '{unbuffered}'; {code}")
    until(lambda: f"ready at {box.url}, but stdout cannot be written: " in run.logged or has_ended(run), "the line")
    until(lambda: answers(box) or has_ended(run), "an answer")
    run.send(signal.SIGTERM)
    assert run.exit_code() == 0, run.logged


def test_a_server_whose_streams_are_closed_has_others_and_serves(new_box: NewBox) -> None:
    box = new_box()
    run = served_in_silence(box, CLOSED)
    until(lambda: answers(box) or has_ended(run), "an answer")
    assert [os.readlink(f"/proc/{run.pid}/fd/{number}") for number in range(3)] == [os.devnull] * 3
    run.send(signal.SIGTERM)
    assert run.exit_code() == 0


# A terminal that closes.


def test_a_hangup_is_to_serve_what_sigterm_is(new_box: NewBox, gate: Path) -> None:
    box = new_box(drain_s="100")
    run = box.serve(workers=1, program=at_hangup("SIG_DFL"))
    anna = box.caller()
    running, waiting = anna.submit(f"hold {gate}"), anna.submit()
    box.in_step(running)
    run.send(signal.SIGHUP)
    until(lambda: WorkerState.DRAINING in {one.state for one in box.store.workers.all()}, "the end to begin")
    gate.touch()
    assert run.exit_code() == 0, run.logged
    assert_nothing_is_left(box, run)
    assert (box.job(running).outcome, box.job(running).attempt) == (Outcome.OK, 1)
    assert box.job(waiting).state is JobState.IN_QUEUE


def test_a_hangup_of_the_api_alone_lets_it_end_in_good_order(new_box: NewBox) -> None:
    run = new_box().serve(program=at_hangup("SIG_DFL"))
    os.kill(run.pids("api")[0], signal.SIGHUP)
    until(lambda: "with exit code 0; it is started again" in run.logged, "its end")


def test_under_nohup_a_hangup_is_nothing(new_box: NewBox) -> None:
    run = new_box().serve(program=at_hangup("SIG_IGN"))
    assert [ignores_hangup(pid) for pid in (run.pid, *run.pids("api"))] == [True, True]


def ignores_hangup(pid: int) -> bool:
    (line,) = re.findall(r"^SigIgn:\t([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(line, 16) >> (signal.SIGHUP - 1) & 1)
