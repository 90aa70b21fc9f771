"""Signals as something that a thread can wait for, and which of them ask a process to end. Knows signals.

A Python signal handler that sets a `threading.Event` can meet the very lock that the thread under it holds, and wait
for ever. So the interpreter writes the number into a socket instead, and the handler does nothing.
"""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator

WAKE = 0  # no signal: another thread wants the waiter to look around
_ASK_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ask_to_end() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to end: a closing terminal sends SIGHUP, which `nohup` has it ignore."""
    hangup_is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in _ASK_TO_END if number is not signal.SIGHUP or not hangup_is_ignored)


class SignalPipe:
    """Where signals arrive, and `wake`. Without `caught` only what threads send arrives: for tests, and for threads."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    @contextlib.contextmanager
    def caught(self, *signals: signal.Signals) -> Iterator[None]:
        """Let these signals arrive here. Only in the main thread."""
        before = {number: signal.signal(number, _do_nothing) for number in signals}
        former = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            for number, handler in before.items():
                signal.signal(number, handler)

    def wake(self, number: int = WAKE) -> None:
        """As if the signal had come. From any thread."""
        with contextlib.suppress(OSError):  # so many wait already that it will be woken; or nobody waits any more
            self._writer.send(bytes([number]))

    def wait(self, timeout_s: float) -> bytes:
        """The numbers of what has arrived, after at most `timeout_s`."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, timeout_s))
        return self._reader.recv(4096) if ready else b""

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class Askings:
    """The signals that ask to end, without repetitions: within `again_s` of one that counted, more are that one again.

    Whoever forwards the Ctrl-C that the terminal has sent already (npm) repeats it, and the kernel sends a parent-death
    signal (leash.py) once for each thread of a parent that is killed.
    """

    def __init__(self, signals: SignalPipe, again_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._signals, self._again_s, self._clock = signals, again_s, clock
        self._counted_at = -math.inf

    def wait(self, timeout_s: float) -> bool:
        """Whether one that counts has arrived, after at most `timeout_s`; anything else that arrives ends the wait."""
        if not any(number in _ASK_TO_END for number in self._signals.wait(timeout_s)):
            return False
        now = self._clock()
        if now - self._counted_at < self._again_s:
            return False
        self._counted_at = now
        return True


def _do_nothing(_number: int, _frame: object) -> None:
    """The interpreter has written the number already."""
