"""One holder at a time, among threads, processes and boxes. Knows file locks; knows nothing of what they guard.

flock(2) belongs to an open file, and each call opens its own, so that one mechanism keeps out other threads of this
process, other processes and, since Linux 2.6.12, other boxes on the same NFS folder. A dead holder's lock is freed by
the kernel.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.02  # flock has no timeout of its own


class LockTimeout(Exception):
    """Another holder kept the lock for the whole of `timeout_s`."""


@contextmanager
def exclusive(path: Path, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold the lock file `path`, and yield its descriptor; the file stays, for whoever counts in it.

    `on_wait` is called between tries; what it raises ends the waiting. Raises `LockTimeout`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(descriptor, path, time.monotonic() + timeout_s, on_wait)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_and_gone(path: Path, timeout_s: float, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` and remove it at the end, so that a lock per URL leaves no file per URL behind."""
    deadline = time.monotonic() + timeout_s
    while True:
        with exclusive(path, deadline - time.monotonic(), on_wait) as descriptor:
            if not _is_still(path, descriptor):
                continue  # its last holder removed it while we waited: the name stands for another file, or none
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _take(descriptor: int, path: Path, deadline: float, on_wait: Callable[[], None] | None) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockTimeout(f"another process holds {path} for too long; see who with `fuser`.") from None
        if on_wait is not None:
            on_wait()
        time.sleep(_POLL_S)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
