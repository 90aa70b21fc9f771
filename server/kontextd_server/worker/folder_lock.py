"""Whether a folder's process lives: it holds a lock, which the kernel frees with it. Knows flock; knows no folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the lock until it is closed; None where a living process has it, or nothing is there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
