"""Removes what has expired and what crashes left in a folder store, and counts anew. Knows ages, not why things age.

Every process of every box may sweep at any time: each step is atomic, and finding it done already is no error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.files.store import Swept

if TYPE_CHECKING:
    from kontextd_server.files.folder import FolderStore

log = logging.getLogger(__name__)

_COUNTS = 3  # tries to count while nobody writes


def sweep(store: FolderStore) -> Swept:
    """All of it, in the order in which one removal makes the next possible."""
    now, grace_s = store.clock(), store.limits.grace_s
    removed = [store.remove(file) for file in store.records.all() if file.is_expired(now)]
    expired = [freed for freed in removed if freed is not None]
    uploads = [store.uploads.remove(upload) for upload in list(store.uploads.expired())]
    leftovers = [
        *(_removed(path) for path in _old(store.blobs.temporary.glob("*"), grace_s)),
        *(_drop_leftover(store, path) for path in _old(store.records.leftovers(), grace_s)),
        *(store.uploads.remove_folder(folder) for folder in _old(store.uploads.leftovers(), grace_s)),
        *filter(None, map(store.blobs.drop_unkept, (store.root / "blobs").glob("??/*"))),
    ]
    _count_anew(store)
    return Swept(len(expired), len(uploads), len(leftovers), sum(expired) + sum(uploads) + sum(leftovers))


def _drop_leftover(store: FolderStore, path: Path) -> int:
    """A content without a record, which was counted, or a record half written, which was not."""
    log.info("removing %s, which a crash left", path)
    return _removed(path) if path.name.startswith(".") else store.blobs.drop(path, path.suffix[1:])


def _removed(path: Path) -> int:
    try:
        found = path.stat()
        path.unlink()
    except FileNotFoundError:
        return 0
    return found.st_size if found.st_nlink == 1 else 0  # else it has a name elsewhere


def _old(paths: Iterable[Path], grace_s: float) -> Iterator[Path]:
    """Those that nothing was done to for `grace_s`: ctime also moves when a link is made, which mtime does not."""
    newest = time.time() - grace_s  # file times are the system's, whatever clock the store was given
    for path in paths:
        try:
            if path.stat().st_ctime <= newest:
                yield path
        except FileNotFoundError:
            continue


def _count_anew(store: FolderStore) -> None:
    """Set the count right: a process that is killed between a link and its count leaves them apart.

    A count taken while others wrote proves nothing and is thrown away; the next sweep tries again.
    """
    ledger = store.blobs.ledger
    for _ in range(_COUNTS):
        before = ledger.snapshot()
        kept = _bytes_kept(store)
        if kept == before.total_bytes or ledger.correct(before, kept):
            return


def _bytes_kept(store: FolderStore) -> int:
    """Bytes of the distinct files below the store, temporary ones and records apart."""
    sizes: dict[tuple[int, int], int] = {}
    for pattern in ("blobs/??/*", "objects/??/*.*", "uploads/*/*"):
        for path in store.root.glob(pattern):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix != ".json" and not path.name.startswith("."):
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
