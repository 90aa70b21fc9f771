"""The file store: what it keeps of a file, and what a store must be able to do. Knows no folder, no HTTP, no URL.

The folder (`folder.py`) is the store of today; an object store can take its place behind the same protocol. It is plain
synchronous code: async callers use threads, one call after the other for one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kontextd_server.files.names import UNKNOWN_TYPE

FOR_EVER = math.inf


@dataclass(frozen=True)
class Label:
    """What is known of a file before it comes. `lifetime_s`: None is the store's default, `FOR_EVER` no end. `owner`
    is told to operators; whoever knows a file's key may read it."""

    file_name: str = "file"
    content_type: str = UNKNOWN_TYPE
    lifetime_s: float | None = None
    owner: str | None = None


@dataclass(frozen=True)
class StoredFile:
    """A file of the store. Times are seconds since the epoch; `expires_at` None is never."""

    key: str
    file_name: str  # as the uploader stated it: to be shown, never a path
    content_type: str  # as the uploader stated it
    size_bytes: int
    sha256: str  # hex
    created_at: float
    expires_at: float | None
    owner: str | None = None  # of the key that sent it, or asked for it; None where that is not known

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True)
class Part:
    """One part of a multipart upload; `etag` is what the store answered to it."""

    number: int
    etag: str


@dataclass(frozen=True)
class Usage:
    used_bytes: int
    quota_bytes: int | None


@dataclass(frozen=True)
class Swept:
    """What a sweep removed, in files; `freed_bytes` on the disk."""

    expired: int
    uploads: int
    leftovers: int
    freed_bytes: int


class FileWriter(AbstractContextManager["FileWriter"], Protocol):
    """A file on its way in; leaving the `with` without `commit` leaves nothing behind."""

    def write(self, chunk: bytes) -> None:
        """Raises `FileTooLarge`, `QuotaExceeded`, `StoreFull`, `StoreUnavailable`."""

    def commit(self) -> StoredFile:
        """Make the file readable under its key, whole. Raises as `write` does, and `KeyTaken`."""


class PartWriter(AbstractContextManager["PartWriter"], Protocol):
    """One part of an upload on its way in."""

    def write(self, chunk: bytes) -> None:
        """Raises as `FileWriter.write` does."""

    def commit(self) -> Part:
        """Keep the part for `complete_upload`. A part sent again takes the place of the former."""


class OpenFile(AbstractContextManager["OpenFile"], Protocol):
    """A file being read; it goes on being readable when it is deleted meanwhile."""

    @property
    def info(self) -> StoredFile: ...

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, at most a mebibyte at a time. Raises `InvalidRange`."""

    def close(self) -> None: ...


class FileStore(Protocol):
    """Files under unguessable keys. A key never changes its content; whoever knows it may read."""

    def new_key(self, file_name: str) -> str:
        """A key for a file that is still to come; nothing is stored yet."""

    def create(self, label: Label, key: str | None = None) -> FileWriter:
        """Begin a file, under a key of `new_key` or a new one. Storing the same again under a key is no error."""

    def put(self, chunks: Iterable[bytes], label: Label, key: str | None = None) -> StoredFile:
        """Store a file from its chunks: `create`, `write`, `commit`."""

    def info(self, key: str) -> StoredFile:
        """Raises `FileNotHere`."""

    def all(self) -> Iterator[StoredFile]:
        """Every file, in no order. It takes the longer the more there are."""

    def open(self, key: str) -> OpenFile:
        """Raises `FileNotHere`."""

    def copy_to(self, key: str, path: Path, progress: Callable[[int, int | None], None] | None = None) -> StoredFile:
        """Make `path` a file of this content, without copying where the store can; nobody may write into it.

        `progress` is called often while it copies; what it raises ends it.
        """

    def delete(self, key: str) -> bool:
        """Remove a file; False where there was none."""

    def begin_upload(self, label: Label, key: str | None = None) -> str:
        """Begin an upload in parts; returns its unguessable id."""

    def write_part(self, upload_id: str, number: int) -> PartWriter:
        """Raises `UploadNotFound`, `InvalidPart`."""

    def complete_upload(self, upload_id: str, parts: Sequence[Part]) -> StoredFile:
        """Join parts by their numbers, listed in whatever order. Asked again after success it answers the same.

        fal's client for Python sends parts side by side and lists each as it is done.
        """

    def abort_upload(self, upload_id: str) -> None:
        """Forget an upload and its parts. Raises `UploadNotFound`."""

    def usage(self) -> Usage:
        """Bytes kept, counted without looking at each file."""

    def sweep(self) -> Swept:
        """Remove what has expired and what crashes left; every process may call it at any time."""
