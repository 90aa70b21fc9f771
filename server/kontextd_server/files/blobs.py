"""Content-addressed bytes in a folder, counted against a quota. Knows SHA-256 and hard links; knows no keys or names.

`blobs/ab/abcd…` is a content under its SHA-256. Whoever keeps it holds a hard link of his own, so the link count is the
count of keepers, kept by the kernel: equal contents are stored once, and dropping `blobs/…` never takes a file from
anybody, whatever another process does at the same moment. On a file system without hard links each keeper has a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from kontextd_server.files.atomic import link_or_move, make_folder
from kontextd_server.files.errors import FileTooLarge, QuotaExceeded, storage_errors
from kontextd_server.files.ledger import Ledger

CHUNK_BYTES = 2**20
CopyProgress = Callable[[int, int | None], None]
_ROUNDS = 3  # of placing a content that others place and drop at the same moment


class BlobFolder:
    """Contents below `root`; several processes and boxes may share it. `quota_bytes` None is no limit."""

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        self.ledger = Ledger(root / "usage")
        self.temporary = root / "tmp"

    def writer(self, limit_bytes: int | None = None) -> BlobWriter:
        """Begin a content of at most `limit_bytes`."""
        with storage_errors(self.root):
            path = make_folder(self.temporary) / f"{secrets.token_hex(16)}.part"
            return BlobWriter(path, limit_bytes, self.room())

    def path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def place(self, content: BlobWriter, target: Path) -> None:
        """Make `target` a name of a finished content. An existing one is left: callers name targets by the content.

        Raises `QuotaExceeded`, and then nothing was placed.
        """
        make_folder(target.parent)
        make_folder(self.path(content.sha256).parent)
        with self.ledger.held() as count:
            added = self._link(content, target)
            content.path.unlink(missing_ok=True)  # or its link would count as one more keeper
            if added and self._is_over(count.total_bytes + added):
                self._unlink(target, content.sha256)
                raise over_quota(self.quota_bytes)
            count.total_bytes += added

    def place_alone(self, content: BlobWriter, target: Path) -> None:
        """Make a finished content the file `target` and nothing else, counted all the same. Raises `QuotaExceeded`."""
        with self.ledger.held() as count:
            if target.exists():
                return
            if self._is_over(count.total_bytes + content.size_bytes):
                raise over_quota(self.quota_bytes)
            content.path.replace(target)
            count.total_bytes += content.size_bytes

    def drop(self, target: Path, sha256: str) -> int:
        """Remove a keeper's name of a content; returns the bytes that this freed."""
        with self.ledger.held() as count:
            freed = self._unlink(target, sha256)
            count.total_bytes -= freed
        return freed

    def drop_unkept(self, blob: Path) -> int:
        """Remove a content that no keeper links any more; returns the bytes that this freed."""
        with contextlib.suppress(FileNotFoundError):
            if blob.stat().st_nlink > 1:
                return 0  # as most are: no need to hold the count
        with self.ledger.held() as count:
            freed = self._unlink_unkept(blob)
            count.total_bytes -= freed
        return freed

    def room(self) -> int | None:
        """Bytes left of the quota; None where there is none."""
        return None if self.quota_bytes is None else max(0, self.quota_bytes - self.ledger.snapshot().total_bytes)

    def _is_over(self, total_bytes: int) -> bool:
        return self.quota_bytes is not None and total_bytes > self.quota_bytes

    def _link(self, content: BlobWriter, target: Path) -> int:
        """Returns the bytes that this added to the disk."""
        blob = self.path(content.sha256)
        if target.exists():
            return 0
        for _ in range(_ROUNDS):
            added = 0
            try:
                os.link(content.path, blob)
                added = content.size_bytes
            except FileExistsError:
                pass  # the same content is here
            except OSError:
                break  # no hard links on this file system
            try:
                os.link(blob, target)
            except FileExistsError:
                pass
            except OSError:
                continue  # dropped in between; or it has all the links a file can have (65,000 on ext4)
            return added
        try:
            link_or_move(content.path, target)
        except FileExistsError:
            return 0
        return content.size_bytes

    def _unlink(self, target: Path, sha256: str) -> int:
        try:
            found = target.stat()
            target.unlink()
        except FileNotFoundError:
            return 0
        alone = found.st_nlink == 1  # a copy of its own
        return found.st_size if alone else self._unlink_unkept(self.path(sha256))

    def _unlink_unkept(self, blob: Path) -> int:
        try:
            found = blob.stat()
            if found.st_nlink > 1:
                return 0
            blob.unlink()
        except FileNotFoundError:
            return 0
        return found.st_size


class BlobWriter:
    """Bytes on their way into a folder, hashed as they come. Leaving the `with` removes what was not placed."""

    def __init__(self, path: Path, limit_bytes: int | None, room_bytes: int | None) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.room_bytes = room_bytes  # of the quota when the writing began: an early answer; `place` decides
        self.size_bytes = 0
        self.sha256 = ""  # hex, of the whole, from `finish` on
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=CHUNK_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, chunk: bytes | memoryview) -> None:
        """Raises `FileTooLarge`, `QuotaExceeded`, `StoreFull`, `StoreUnavailable`."""
        size_bytes = self.size_bytes + len(chunk)
        if self.limit_bytes is not None and size_bytes > self.limit_bytes:
            raise FileTooLarge(f"the file has more than the {self.limit_bytes} bytes allowed. Send a smaller one.")
        if self.room_bytes is not None and size_bytes > self.room_bytes:
            raise over_quota(self.room_bytes)
        with storage_errors(self.path.parent):
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size_bytes = size_bytes

    def finish(self) -> str:
        """Bring everything to the disk; returns the SHA-256 in hex."""
        if not self.sha256:
            with storage_errors(self.path.parent):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self.sha256 = self._hash.hexdigest()
        return self.sha256

    def discard(self) -> None:
        """Remove the temporary file. What it was placed as stays."""
        with contextlib.suppress(OSError):  # a full disk cannot take the buffer, which is not wanted any more
            self._file.close()
        self.path.unlink(missing_ok=True)


def over_quota(room_bytes: int | None) -> QuotaExceeded:
    return QuotaExceeded(
        f"the file store has no room for more than {room_bytes} bytes. Delete files, or raise its quota."
    )


def link_or_copy(source: Path, target: Path, progress: CopyProgress | None = None) -> None:
    """Give a file another name, or where that cannot be (another disk, no hard links) a copy.

    A copy calls `progress` after each mebibyte, with the bytes so far and of the whole; what it raises ends it.
    """
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        _copy(source, target, progress or _ignore)


def _copy(source: Path, target: Path, progress: CopyProgress) -> None:
    copied_bytes = 0
    with source.open("rb") as reading, target.open("wb") as writing:
        size_bytes = os.fstat(reading.fileno()).st_size
        while chunk := reading.read(CHUNK_BYTES):
            writing.write(chunk)
            copied_bytes += len(chunk)
            progress(copied_bytes, size_bytes)


def _ignore(_: int, __: int | None) -> None:
    """Nobody wants to know."""
