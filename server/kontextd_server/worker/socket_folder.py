"""The folder of a supervisor's sockets, which is found and removed if it is killed. Knows folders; knows no words.

It lies in the system's folder for temporary files, since the path of a socket has at most 107 bytes. Whatever else may
have such a name there is left alone: only sockets are removed, and what is empty then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path
from secrets import token_hex

from kontextd_server.worker.folder_lock import try_lock

log = logging.getLogger(__name__)

_PREFIX = "kontextd-serve-"
_MOST_BYTES = 107  # of a socket's path: unix(7)
MOST_BYTES_OF_ROOT = _MOST_BYTES - len(f"/{_PREFIX}{'x' * 8}/{'0' * 8}.sock")  # as mkdtemp and `socket_path` name them


def socket_path(folder: Path) -> Path:
    """Of a new socket."""
    return folder / f"{token_hex(4)}.sock"


class SocketFolder:
    """Made with mode 0700, so that nobody else can speak for a child. What killed supervisors left is removed."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for left in root.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        self.path, self._lock = _made(root)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _made(root: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = try_lock(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:  # another one, which starts as well, took it for a left one
            os.close(lock)


def _remove_if_left(folder: Path) -> None:
    found = folder.lstat() if folder.exists() else None
    if found is None or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    lock = try_lock(folder)
    if lock is None:
        return
    log.info("removing %s, which a killed supervisor left", folder)
    with contextlib.suppress(OSError):  # it is not ours after all; or another one, which starts as well, was quicker
        for path in folder.iterdir():
            if path.is_socket():
                path.unlink()
        folder.rmdir()
    os.close(lock)
