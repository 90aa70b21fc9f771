"""Signals as something that a thread can wait for. Knows signals; decides nothing.

A Python signal handler that sets a `threading.Event` can meet the very lock that the thread under it holds, and wait
for ever. So the interpreter writes the number into a socket instead, and the handler does nothing.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Iterator

WAKE = 0  # no signal: another thread wants the waiter to look around


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


def _do_nothing(_number: int, _frame: object) -> None:
    """The interpreter has written the number already."""
