"""Folders for the inputs of running jobs, which nobody finds afterwards. Knows folders and locks; knows no inputs.

Each worker has one below a common root and holds a lock on it for as long as it lives. The kernel frees the lock of a
worker that is killed, and the next worker that starts removes what it left.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kontextd_server.files.atomic import PRIVATE, make_folder
from kontextd_server.files.errors import StoreUnavailable, storage_errors
from kontextd_server.worker.folder_lock import try_lock

log = logging.getLogger(__name__)

_ROUNDS, _PAUSE_S = 50, 0.02


class Scratch:
    """Made by `scratch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._emptied: Path | None = None  # of the job before

    @contextmanager
    def job(self) -> Iterator[Path]:
        """An empty folder under a name of its own, emptied at the end. One at a time. Raises `FileStoreError`."""
        with storage_errors(self.folder):
            path = self._fresh()
        try:
            yield path
        finally:
            self._emptied = path if _empty(path) else None

    def _fresh(self) -> Path:
        """The former job's folder under a new name, where there is one: ext4 takes its time to make a folder or a file
        where others were removed in the last minutes, and the more of them the longer."""
        path, former, self._emptied = self.folder / secrets.token_hex(8), self._emptied, None
        if former is not None:
            with suppress(FileNotFoundError):  # somebody has tidied up
                return former.rename(path)
        path.mkdir(mode=PRIVATE)
        return path


@contextmanager
def scratch(root: Path, worker_id: str) -> Iterator[Scratch]:
    """This worker's folder below `root`. What dead workers left there is removed."""
    make_folder(root)
    for left in root.iterdir():
        _remove_if_dead(left)
    folder = root / worker_id
    lock = _locked(folder)
    try:
        yield Scratch(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int:
    """The lock on a folder, which is made where absent. Another worker's cleaning may take it away in between."""
    for _ in range(_ROUNDS):
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        descriptor = try_lock(folder)
        if descriptor is not None and folder.exists():
            return descriptor
        if descriptor is not None:
            os.close(descriptor)
        time.sleep(_PAUSE_S)
    raise StoreUnavailable(f"{folder} is held by another process. Give each worker an id of its own.")


def _empty(folder: Path) -> bool:
    """Remove all that is in a folder; where that does not succeed, the folder too, as far as it goes."""
    try:
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _remove_if_dead(folder: Path) -> None:
    descriptor = try_lock(folder)
    if descriptor is None:
        return
    log.info("removing %s, which a dead worker left", folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
