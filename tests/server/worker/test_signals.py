"""Which signals ask a process to end, and which of them are one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from kontextd_server.worker.signals import WAKE, Askings, SignalPipe, ask_to_end


@pytest.fixture
def signals() -> Iterator[SignalPipe]:
    with closing(SignalPipe()) as made:
        yield made


@pytest.fixture
def _own_hangup() -> Iterator[None]:
    """What is done at SIGHUP is this test's own."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.usefixtures("_own_hangup")
def test_a_terminal_that_closes_asks_to_end_unless_that_is_ignored(signals: SignalPipe) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ask_to_end() == (signal.SIGTERM, signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals.caught(*ask_to_end()):
        os.kill(os.getpid(), signal.SIGHUP)
        assert Askings(signals, again_s=0.0).wait(0.0)


def test_other_signals_and_wakes_do_not_ask(signals: SignalPipe) -> None:
    askings = Askings(signals, again_s=0.0)
    assert not askings.wait(0.0)
    for number in (WAKE, signal.SIGCHLD):
        signals.wake(number)
        assert not askings.wait(0.0)


def test_repetitions_do_not_count_and_do_not_put_off_when_the_next_one_does(signals: SignalPipe) -> None:
    clock = Clock()
    askings = Askings(signals, again_s=1.0, clock=clock)
    counted = []
    for pressed_s in (0.0, 0.9, 1.8, 2.7, 3.6):
        clock.now = 1000.0 + pressed_s
        signals.wake(signal.SIGINT)
        counted.append(askings.wait(0.0))
    assert counted == [True, False, True, False, True]


def test_any_signal_repeats_any_other(signals: SignalPipe) -> None:
    askings = Askings(signals, again_s=1.0, clock=Clock())
    counted = []
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signals.wake(number)
        counted.append(askings.wait(0.0))
    assert counted == [True, False, False]
