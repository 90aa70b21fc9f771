"""Children that die, hang or do not want to end. They are real processes, and small; two tests use real workers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import supervisor_main
from conftest import WAIT_S, until
from kontextd_server.store import Job, Outcome, Store
from kontextd_server.worker import (
    Backoff,
    ChildSpec,
    Companion,
    Housekeeping,
    HousekeepingPolicy,
    Notifier,
    SupervisorPolicy,
)
from kontextd_server.worker.notify import NotifySocket
from kontextd_server.worker.signals import SignalPipe
from kontextd_server.worker.supervisor import Supervisor

HERE = Path(__file__).parent
QUICK = SupervisorPolicy(tick_s=0.02, restart=Backoff(0.02, 0.5), stable_s=60.0, term_s=0.5, stop_s=2.0, tail_lines=3)
# What a child needs to speak without importing anything of ours.
SAY = """
import os, signal, socket, sys, time
def say(word):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(word.encode(), os.environ["NOTIFY_SOCKET"])
def note(word):
    with open(sys.argv[1], "a") as file:
        file.write(f"{word} {os.getpid()}\\n")
"""


def child(code: str, notes: Path) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", SAY + code, str(notes)]


@dataclass
class Supervised:
    """A supervisor in a thread."""

    specs: Sequence[ChildSpec]
    companions: Sequence[Companion] = ()
    policy: SupervisorPolicy = QUICK
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    lost: list[str] = field(default_factory=list)
    on_lost: Callable[[str], object] | None = None
    codes: list[int] = field(default_factory=list)
    signals: SignalPipe = field(default_factory=SignalPipe)

    def __post_init__(self) -> None:
        on_lost = self.on_lost or self.lost.append
        made = Supervisor(self.specs, self.companions, on_lost, self.environment, self.policy, self.signals)
        self.thread = threading.Thread(target=lambda: self.codes.append(made.run()))
        self.thread.start()

    def end(self) -> int:
        if self.thread.is_alive():
            self.signals.wake(signal.SIGTERM)
            self.thread.join(WAIT_S)
            assert not self.thread.is_alive()
        self.signals.close()
        return self.codes[-1]


@pytest.fixture
def supervised() -> Iterator[Callable[..., Supervised]]:
    made: list[Supervised] = []

    def begin(*specs: ChildSpec, **words: object) -> Supervised:
        made.append(Supervised(specs, **words))
        return made[-1]

    yield begin
    for one in made:
        one.end()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """What children write down: a word and their pid a line."""
    path = tmp_path / "notes"
    path.touch()
    return path


def words_in(notes: Path) -> list[str]:
    return [line.split()[0] for line in notes.read_text().splitlines()]


def pids_in(notes: Path) -> list[int]:
    return [int(line.split()[1]) for line in notes.read_text().splitlines()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Dying.


def test_a_child_that_dies_is_started_again_later_each_time_and_its_last_words_are_logged(
    supervised: Callable[..., Supervised], notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = 'note("up"); print("one\\ntwo\\nthree\\nno more memory", file=sys.stderr); os.kill(os.getpid(), 9)'
    one = supervised(ChildSpec("w", lambda _: child(code, notes), is_worker=True))
    until(lambda: len(words_in(notes)) >= 5)
    assert one.end() == 0
    ends = [record.getMessage() for record in caplog.records if "ended after" in record.getMessage()]
    assert all("with SIGKILL; it is started again in " in end for end in ends)
    assert ends[0].endswith("two\nthree\nno more memory")
    waits = [float(end.partition("again in ")[2].split()[0]) for end in ends]
    assert waits[3] > waits[0]
    assert "(4 in a row)" in ends[3]
    assert len(one.lost) == len(set(one.lost)) >= 4  # each run is a worker of its own


def test_each_run_gets_an_id_of_its_own_for_its_command(supervised: Callable[..., Supervised], notes: Path) -> None:
    one = supervised(ChildSpec("w", lambda run_id: child(f"note('{run_id}')", notes), is_worker=True))
    until(lambda: len(one.lost) >= 3)
    one.end()
    assert words_in(notes)[:3] == one.lost[:3]


def test_what_a_dead_child_had_started_ends_with_it(supervised: Callable[..., Supervised], notes: Path) -> None:
    code = """
note("parent")
heard, said = os.pipe()
if os.fork() == 0:
    note("grandchild")
    os.write(said, b"!")
    time.sleep(600)
os.read(heard, 1)
os.kill(os.getpid(), 9)
"""
    supervised(ChildSpec("w", lambda _: child(code, notes)), policy=SupervisorPolicy(tick_s=0.02))
    until(lambda: words_in(notes)[:2] == ["parent", "grandchild"])
    until(lambda: not is_alive(pids_in(notes)[1]))


def test_a_child_that_can_never_start_ends_everything_with_its_code(
    supervised: Callable[..., Supervised], notes: Path
) -> None:
    one = supervised(
        ChildSpec("w", lambda _: child("time.sleep(0.2); sys.exit(2)", notes), final_codes=frozenset({2})),
        ChildSpec("api", lambda _: child('note("up"); time.sleep(600)', notes)),
    )
    one.thread.join(WAIT_S)
    assert one.codes == [2]
    assert not any(is_alive(pid) for pid in pids_in(notes))


def test_the_same_code_is_no_reason_to_end_once_a_run_was_ready(
    supervised: Callable[..., Supervised], notes: Path
) -> None:
    code = 'say("READY=1"); time.sleep(0.2); note("up"); sys.exit(2)'
    one = supervised(ChildSpec("w", lambda _: child(code, notes), final_codes=frozenset({2})))
    until(lambda: len(words_in(notes)) >= 2)
    assert one.end() == 0


# Hanging.


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ('note("up"); say("WATCHDOG=1"); time.sleep(600)', "has said nothing for"),
        ('note("up"); say("WATCHDOG=trigger"); time.sleep(600)', "says that it hangs"),
        ('note("up"); say("WATCHDOG=1"); os.kill(os.getpid(), signal.SIGSTOP)', "has said nothing for"),
        ('signal.signal(15, signal.SIG_IGN); note("up"); say("WATCHDOG=trigger"); time.sleep(600)', "is killed"),
    ],
    ids=["silent", "says so", "stopped", "ignores SIGTERM"],
)
def test_a_child_that_hangs_is_ended_and_started_again(
    supervised: Callable[..., Supervised], notes: Path, caplog: pytest.LogCaptureFixture, code: str, why: str
) -> None:
    silence_s = 1.0 if "nothing" in why else 30.0
    supervised(ChildSpec("w", lambda _: child(code, notes), silence_s=silence_s))
    until(lambda: len(words_in(notes)) >= 2)
    assert not is_alive(pids_in(notes)[0])
    assert why in caplog.text


def test_a_child_that_goes_on_saying_that_it_lives_is_left_alone(
    supervised: Callable[..., Supervised], notes: Path
) -> None:
    code = 'note("up")\nwhile True:\n    say("WATCHDOG=1")\n    note("on")\n    time.sleep(0.1)'
    began, silence_s = time.monotonic(), 4.0  # longer than a busy machine lets a child wait for its turn
    supervised(ChildSpec("w", lambda _: child(code, notes), silence_s=silence_s))
    until(lambda: words_in(notes).count("on") >= 15 and time.monotonic() > began + 1.5 * silence_s)
    assert words_in(notes).count("up") == 1


# Ending.


def test_at_the_end_children_are_asked_first_and_killed_after_a_bound(
    supervised: Callable[..., Supervised], notes: Path
) -> None:
    polite = 'signal.signal(15, lambda *_: (note("asked"), sys.exit(0))); note("polite"); time.sleep(600)'
    stubborn = 'signal.signal(15, signal.SIG_IGN); note("stubborn"); time.sleep(600)'
    one = supervised(
        ChildSpec("a", lambda _: child(polite, notes)),
        ChildSpec("b", lambda _: child(stubborn, notes)),
        policy=SupervisorPolicy(tick_s=0.02, stop_s=3.0, term_s=60.0),
    )
    until(lambda: len(words_in(notes)) == 2)
    began = time.monotonic()
    assert one.end() == 0
    assert 3.0 <= time.monotonic() - began < 60
    assert words_in(notes)[2:] == ["asked"]
    assert not any(is_alive(pid) for pid in pids_in(notes))


def test_a_second_signal_ends_everything_at_once(supervised: Callable[..., Supervised], notes: Path) -> None:
    stubborn = 'signal.signal(15, lambda *_: note("asked")); note("stubborn"); time.sleep(600)'
    policy = SupervisorPolicy(stop_s=600.0, again_s=0.0)
    one = supervised(ChildSpec("b", lambda _: child(stubborn, notes)), policy=policy)
    until(lambda: words_in(notes))
    one.signals.wake(signal.SIGTERM)
    until(lambda: "asked" in words_in(notes))
    one.signals.wake(signal.SIGINT)
    one.thread.join(WAIT_S)
    assert one.codes == [0]
    assert not is_alive(pids_in(notes)[0])


class Counted(SignalPipe):
    """What has been taken in, and how often somebody has looked since."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.looks = b"", 0

    def wait(self, timeout_s: float) -> bytes:
        self.looks += 1
        if arrived := super().wait(timeout_s):
            self.taken, self.looks = self.taken + arrived, 0
        return arrived


def test_a_signal_in_quick_succession_leaves_children_their_time(
    supervised: Callable[..., Supervised], notes: Path, tmp_path: Path
) -> None:
    """What forwards the Ctrl-C of a terminal repeats it, and the death of a parent is told once a thread."""
    gate, signals = tmp_path / "gate", Counted()
    draining = f"""
def drain(*_):
    note("asked")
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.01)
    note("drained")
    sys.exit(0)
signal.signal(15, drain)
note("up")
time.sleep(600)
"""
    policy = SupervisorPolicy(tick_s=0.02, stop_s=600.0, again_s=600.0)
    one = supervised(ChildSpec("b", lambda _: child(draining, notes)), policy=policy, signals=signals)
    until(lambda: words_in(notes))
    signals.wake(signal.SIGINT)
    until(lambda: "asked" in words_in(notes))
    signals.wake(signal.SIGINT)
    until(lambda: signals.taken.count(signal.SIGINT) == 2 and signals.looks >= 2)
    gate.touch()
    one.thread.join(WAIT_S)
    assert one.codes == [0]
    assert words_in(notes) == ["up", "asked", "drained"]


def test_children_end_when_their_supervisor_is_killed(forkserver: ForkServerContext, notes: Path) -> None:
    command = child('note("up"); time.sleep(600)', notes)
    supervisor = forkserver.Process(target=supervisor_main.run, args=(command,))
    supervisor.start()
    until(lambda: words_in(notes))
    supervisor.kill()
    supervisor.join(WAIT_S)
    until(lambda: not is_alive(pids_in(notes)[0]))


def test_a_supervisor_process_ends_in_good_order_at_sigterm(
    forkserver: ForkServerContext, notes: Path, tmp_path: Path
) -> None:
    command = child('note("up"); print("a word", file=sys.stderr); time.sleep(600)', notes)
    supervisor = forkserver.Process(target=supervisor_main.run, args=(command, str(tmp_path / "stderr")))
    supervisor.start()
    until(lambda: "a word" in (tmp_path / "stderr").read_text() if words_in(notes) else False)
    supervisor.terminate()
    supervisor.join(WAIT_S)
    assert supervisor.exitcode == 0
    assert not is_alive(pids_in(notes)[0])


# Beside the children.


def test_a_companion_that_fails_is_begun_again_and_ends_with_the_rest(
    supervised: Callable[..., Supervised],
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kontextd_server.worker.supervisor._COMPANION_PAUSE_S", 0.05)
    runs: list[str] = []

    class Unsteady:
        def run(self, stop: threading.Event) -> None:
            runs.append("begun")
            if len(runs) == 1:
                raise RuntimeError("at the first time")
            stop.wait()
            runs.append("ended")

    one = supervised(companions=[Unsteady()])
    until(lambda: len(runs) == 2)
    one.end()
    assert runs == ["begun", "begun", "ended"]
    assert "Unsteady failed" in caplog.text


def test_systemd_is_told_when_all_children_are_ready(
    supervised: Callable[..., Supervised], notes: Path, tmp_path: Path
) -> None:
    with NotifySocket(tmp_path / "systemd.sock") as systemd:
        heard: list[str] = []
        one = supervised(
            ChildSpec("a", lambda _: child('note("a"); say("READY=1"); time.sleep(600)', notes)),
            ChildSpec("b", lambda _: child('note("b"); time.sleep(0.3); say("READY=1"); time.sleep(600)', notes)),
            environment={**os.environ, "NOTIFY_SOCKET": systemd.address},
        )
        until(lambda: "READY=1" in (heard.extend(systemd.heard()) or heard))  # heard at once: what waits may be dropped
        assert sorted(words_in(notes)) == ["a", "b"]
        one.end()
        heard += systemd.heard()
    assert heard[0] == "WATCHDOG=1"
    assert heard.count("READY=1") == 1
    assert heard[-1] == "STOPPING=1"


def test_words_without_a_listener_go_nowhere(tmp_path: Path) -> None:
    for address in (None, "", str(tmp_path / "nobody.sock"), "@kontextd-nobody"):
        notifier = Notifier(address)
        notifier.tell("READY=1")
        notifier.close()


# With real workers.


@pytest.fixture
def worker_command(database_url: str, tmp_path: Path) -> Callable[..., Callable[[str], list[str]]]:
    def make(**settings: object) -> Callable[[str], list[str]]:
        told = {"database": database_url, "files": str(tmp_path / "files"), **settings}

        def command(run_id: str) -> list[str]:
            return [sys.executable, str(HERE / "null_worker.py"), json.dumps({**told, "worker_id": run_id})]

        return command

    return make


def test_a_job_that_kills_or_hangs_its_workers_fails_for_good_and_others_run(
    store: Store,
    supervised: Callable[..., Supervised],
    worker_command: Callable[..., Callable[[str], list[str]]],
    submit: Callable[..., str],
    completed: Callable[[str], Job],
    caplog: pytest.LogCaptureFixture,
) -> None:
    housekeeping = Housekeeping(store, HousekeepingPolicy(sweep_s=60.0))
    poison, harmless = submit("die", webhook_url="https://studio.example"), submit()
    hanging = submit("hang", no_retry=True)
    spec = ChildSpec("w", worker_command(deadlines={"step_s": 1.0}), is_worker=True, silence_s=60.0)
    patient = replace(QUICK, stop_s=60.0, term_s=60.0)  # for a worker that is to sign off
    one = supervised(spec, companions=[housekeeping], on_lost=housekeeping.report_lost, policy=patient)
    assert completed(harmless).outcome is Outcome.OK
    assert how(completed(poison)) == (Outcome.FAILED, 3, 500, "runner_disconnected")
    assert how(completed(hanging)) == (Outcome.FAILED, 1, 500, "runner_disconnected")
    assert "says that it hangs" in caplog.text
    assert one.end() == 0
    assert store.views.gauges().webhooks_pending == 1
    assert store.workers.all() == ()


def how(job: Job) -> tuple[object, ...]:
    return job.outcome, job.attempt, job.http_status, job.error_type
