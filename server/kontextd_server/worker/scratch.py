"""Folders for the inputs of running jobs, which nobody finds afterwards. Knows folders and locks; knows no inputs.

Each worker has one below a common root and holds a lock on it for as long as it lives. The kernel frees the lock of a
worker that is killed, and the next worker that starts removes what it left.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def job(self) -> Iterator[Path]:
        """An empty folder, removed at the end with all that is in it. Raises `FileStoreError`."""
        with storage_errors(self.folder):
            path = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


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


def _remove_if_dead(folder: Path) -> None:
    descriptor = try_lock(folder)
    if descriptor is None:
        return
    log.info("removing %s, which a dead worker left", folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
