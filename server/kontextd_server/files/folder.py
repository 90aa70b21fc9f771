"""The file store in a folder, which several processes and boxes may share. Knows disks; knows no HTTP, no URL.

    objects/   records and contents by key (records.py)
    blobs/     contents by SHA-256 (blobs.py)
    uploads/   multipart uploads (multipart.py)
    tmp/       what is being written
    usage      bytes kept (ledger.py)

A record is written last and removed first, each in one atomic step: no reader meets a half file, and what a crash
leaves is a content without a record, which the sweep removes once it is older than `grace_s`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kontextd_server.files import names, sweeping
from kontextd_server.files.atomic import make_folder
from kontextd_server.files.blobs import CHUNK_BYTES, BlobFolder, BlobWriter, CopyProgress, link_or_copy
from kontextd_server.files.errors import FileNotHere, InvalidRange, KeyTaken, StoreUnavailable, storage_errors
from kontextd_server.files.multipart import FolderPartWriter, PartLimits, Upload, Uploads
from kontextd_server.files.records import Records
from kontextd_server.files.store import Label, Part, StoredFile, Swept, Usage


@dataclass(frozen=True)
class FolderLimits:
    """Sizes in bytes, times in seconds; None is no limit, infinity no end."""

    quota_bytes: int | None = None
    max_file_bytes: int | None = 16 * 2**30
    default_lifetime_s: float = math.inf
    max_lifetime_s: float = math.inf
    grace_s: float = 3600.0  # younger leftovers may still be somebody's work: no write pauses for so long
    parts: PartLimits = field(default_factory=PartLimits)


class FolderStore:
    """`FileStore` in the folder `root`, which is made where absent."""

    def __init__(self, root: Path, limits: FolderLimits | None = None, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self.limits = limits or FolderLimits()
        self.clock = clock
        self.blobs = BlobFolder(root, self.limits.quota_bytes)
        self.records = Records(root / "objects")
        self.uploads = Uploads(root / "uploads", self.blobs, self.limits.parts, clock)
        with storage_errors(root):
            make_folder(root)

    def new_key(self, file_name: str) -> str:
        return names.new_key(file_name)

    def create(self, label: Label, key: str | None = None) -> FolderFileWriter:
        return FolderFileWriter(self, label, key or self.new_key(label.file_name))

    def put(self, chunks: Iterable[bytes], label: Label, key: str | None = None) -> StoredFile:
        with self.create(label, key) as writer:
            for chunk in chunks:
                writer.write(chunk)
            return writer.commit()

    def info(self, key: str) -> StoredFile:
        with storage_errors(self.root):
            found = self.records.read(key)
        if found is None or found.is_expired(self.clock()):
            raise FileNotHere(f"there is no file {key[:120]!r}. It may have expired.")
        return found

    def all(self) -> Iterator[StoredFile]:
        now = self.clock()
        with storage_errors(self.root):
            yield from (file for file in self.records.all() if not file.is_expired(now))

    def open(self, key: str) -> FolderOpenFile:
        found = self.info(key)
        with storage_errors(self.root), self._content(found) as path:
            return FolderOpenFile(found, path)

    def copy_to(self, key: str, path: Path, progress: CopyProgress | None = None) -> StoredFile:
        found = self.info(key)
        with storage_errors(path.parent), self._content(found) as content:
            link_or_copy(content, path, progress)
        return found

    def delete(self, key: str) -> bool:
        with storage_errors(self.root):
            found = self.records.read(key)
            return found is not None and self.remove(found) is not None

    def begin_upload(self, label: Label, key: str | None = None) -> str:
        return self.uploads.begin(label, key or self.new_key(label.file_name))

    def write_part(self, upload_id: str, number: int) -> FolderPartWriter:
        return self.uploads.write_part(upload_id, number)

    def complete_upload(self, upload_id: str, parts: Sequence[Part]) -> StoredFile:
        """Joins the parts chunk by chunk; the parts go once the file is there."""
        upload = self.uploads.find(upload_id)
        with self.uploads.joining(upload):
            with storage_errors(self.root):
                done = self.records.read(upload.key)
            return done or self._join(upload, parts)  # done: the first answer got lost, or took too long

    def abort_upload(self, upload_id: str) -> None:
        self.uploads.abort(upload_id)

    def usage(self) -> Usage:
        with storage_errors(self.root):
            return Usage(self.blobs.ledger.snapshot().total_bytes, self.limits.quota_bytes)

    def sweep(self) -> Swept:
        with storage_errors(self.root):
            return sweeping.sweep(self)

    def publish(self, content: BlobWriter, label: Label, key: str) -> StoredFile:
        """Make a content readable under `key`. Raises `KeyTaken` and `QuotaExceeded`."""
        file = self._described(content, label, key)
        with storage_errors(self.root):
            try:
                self.blobs.place(content, self.records.content(key, file.sha256))
                self.records.create(file)
            except FileExistsError:
                return self._same_or_taken(file)
            except BaseException:
                self._withdraw(file)
                raise
            self._check_kept(file)
        return file

    def remove(self, file: StoredFile) -> int | None:
        """Remove a file, its record first; the bytes freed, or None where another process was quicker."""
        if not self.records.remove(file.key):
            return None
        return self.blobs.drop(self.records.content(file.key, file.sha256), file.sha256)

    def _join(self, upload: Upload, parts: Sequence[Part]) -> StoredFile:
        with self.create(upload.label, upload.key) as writer:
            for chunk in self.uploads.joined(upload, parts, self.limits.max_file_bytes):
                writer.write(chunk)
            stored = writer.commit()
        self.uploads.drop_parts(self.uploads.folder(upload.id))
        return stored

    def _described(self, content: BlobWriter, label: Label, key: str) -> StoredFile:
        now = self.clock()
        asked = self.limits.default_lifetime_s if label.lifetime_s is None else label.lifetime_s
        lifetime_s = min(max(0.0, asked), self.limits.max_lifetime_s)
        return StoredFile(
            key=key,
            file_name=names.stated_name(label.file_name),
            content_type=names.stated_type(label.content_type),
            size_bytes=content.size_bytes,
            sha256=content.finish(),
            created_at=now,
            expires_at=now + lifetime_s if math.isfinite(lifetime_s) else None,
            owner=label.owner,
        )

    def _same_or_taken(self, file: StoredFile) -> StoredFile:
        """The file that holds the key, where it is this one: a repeated upload, whose first answer got lost."""
        holder = self.records.read(file.key)
        if holder is not None and holder.sha256 == file.sha256:
            return holder
        self._withdraw(file)
        raise KeyTaken(f"the address {file.key!r} holds other content already. Ask for a new one.")

    def _check_kept(self, file: StoredFile) -> None:
        """Whoever deleted a file of this very key and content just now may have taken the content that we relied on."""
        if not self.records.content(file.key, file.sha256).exists():
            self.records.remove(file.key)
            raise StoreUnavailable(f"{file.key!r} was deleted while it was stored. Send it again.")

    def _withdraw(self, file: StoredFile) -> None:
        """Drop a content that was placed but got no record, unless the record there is of the same content."""
        holder = self.records.read(file.key)
        if holder is None or holder.sha256 != file.sha256:
            self.blobs.drop(self.records.content(file.key, file.sha256), file.sha256)

    @contextmanager
    def _content(self, file: StoredFile) -> Iterator[Path]:
        """The content of a file that was there a moment ago."""
        try:
            yield self.records.content(file.key, file.sha256)
        except FileNotFoundError as error:
            self.info(file.key)  # deleted in between: raises
            raise StoreUnavailable(f"the content of {file.key!r} is lost. Restore {self.root}.") from error


class FolderFileWriter:
    """`FileWriter` of the folder store."""

    def __init__(self, store: FolderStore, label: Label, key: str) -> None:
        names.token_of(key)  # a key that was not made by `new_key` names no file
        self.store = store
        self.label = label
        self.key = key
        self.content = store.blobs.writer(store.limits.max_file_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.content.discard()

    def write(self, chunk: bytes) -> None:
        self.content.write(chunk)

    def commit(self) -> StoredFile:
        return self.store.publish(self.content, self.label, self.key)


class FolderOpenFile:
    """`OpenFile` of the folder store."""

    def __init__(self, info: StoredFile, path: Path) -> None:
        self.info = info
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        end = self.info.size_bytes if stop is None else stop
        if not 0 <= start <= end <= self.info.size_bytes:
            raise InvalidRange(f"bytes {start} to {end} lie outside a file of {self.info.size_bytes} bytes.")
        return self._chunks(start, end)

    def close(self) -> None:
        self._file.close()

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        with storage_errors(Path(str(self._file.name)).parent):
            self._file.seek(start)
            while start < end:
                chunk = self._file.read(min(CHUNK_BYTES, end - start))
                if not chunk:
                    raise StoreUnavailable(f"{self.info.key!r} is shorter than it was. Restore it from a backup.")
                start += len(chunk)
                yield chunk
