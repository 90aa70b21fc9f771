"""Uploads in parts, in a folder. Knows parts and their sums; knows nothing of the file that they become.

    uploads/<id>/upload.json      the key and label of the file, and when the upload expires
    uploads/<id>/00001.<etag>     a part; the etag is its SHA-256, so that two versions of one part never meet
    uploads/<id>/lock             there while somebody joins the parts

A part is hashed as it comes and joined chunk by chunk: nothing holds more than a chunk in memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kontextd_server.files.atomic import as_json, create_whole, make_folder, read_json
from kontextd_server.files.blobs import CHUNK_BYTES, BlobFolder
from kontextd_server.files.errors import FileTooLarge, InvalidPart, StoreUnavailable, UploadNotFound, storage_errors
from kontextd_server.files.locks import LockTimeout, exclusive_and_gone
from kontextd_server.files.names import new_token
from kontextd_server.files.store import Label, Part

_JOIN_TIMEOUT_S = 600.0  # for whoever waits: the largest file of all takes minutes on a slow disk
_ID = re.compile("[a-z2-7]{26}")
_ETAG = re.compile("[0-9a-f]{64}")
_PART = re.compile("[0-9]{5}[.][0-9a-f]{64}")


@dataclass(frozen=True)
class PartLimits:
    """Sizes in bytes; `lifetime_s` of an upload that nobody completes."""

    max_part_bytes: int = 512 * 2**20
    max_parts: int = 10_000
    lifetime_s: float = 24 * 3600.0


@dataclass(frozen=True)
class Upload:
    """An upload that was begun. `expires_at` in seconds since the epoch."""

    id: str
    key: str
    label: Label
    expires_at: float


class Uploads:
    """The uploads below the folder `root`; their parts count against the quota of `blobs`."""

    def __init__(self, root: Path, blobs: BlobFolder, limits: PartLimits, clock: Callable[[], float]) -> None:
        self.root = root
        self.blobs = blobs
        self.limits = limits
        self.clock = clock

    def begin(self, label: Label, key: str) -> str:
        upload = Upload(new_token(), key, label, self.clock() + self.limits.lifetime_s)
        with storage_errors(self.root):
            create_whole(make_folder(self.folder(upload.id)) / "upload.json", as_json(asdict(upload)))
        return upload.id

    def find(self, upload_id: str) -> Upload:
        """Raises `UploadNotFound` for an id that is none, unknown or expired."""
        found = None
        if _ID.fullmatch(upload_id):
            with storage_errors(self.root):
                found = _read(self.folder(upload_id))
        if found is None or found.expires_at <= self.clock():
            raise UploadNotFound(f"there is no upload {upload_id[:80]!r}. It may have expired: begin a new one.")
        return found

    def write_part(self, upload_id: str, number: int) -> FolderPartWriter:
        upload = self.find(upload_id)
        if not 1 <= number <= self.limits.max_parts:
            raise InvalidPart(f"part number {number} is outside 1 to {self.limits.max_parts}.")
        return FolderPartWriter(self, self.folder(upload.id), number)

    @contextlib.contextmanager
    def joining(self, upload: Upload) -> Iterator[None]:
        """One at a time: clients repeat the call that joins the parts when its answer takes long.

        Raises `UploadNotFound` where the upload is gone, `StoreUnavailable` where another keeps it for too long.
        """
        with storage_errors(self.root), contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive_and_gone(self.folder(upload.id) / "lock", _JOIN_TIMEOUT_S))
            except FileNotFoundError as error:
                raise UploadNotFound("the upload was aborted or has expired. Begin a new one.") from error
            except LockTimeout as error:
                raise StoreUnavailable(f"the upload is being completed: {error}. Ask again later.") from error
            yield

    def joined(self, upload: Upload, parts: Sequence[Part], limit_bytes: int | None) -> Iterator[bytes]:
        """The bytes of the whole, once all of the list was checked. Raises `InvalidPart`, `FileTooLarge`."""
        return _chunks(self._checked(upload, parts, limit_bytes))

    def abort(self, upload_id: str) -> None:
        self.remove(self.find(upload_id))

    def remove(self, upload: Upload) -> int:
        """Forget an upload; returns the bytes freed."""
        folder = self.folder(upload.id)
        with storage_errors(self.root):
            (folder / "upload.json").unlink(missing_ok=True)
        return self.remove_folder(folder)

    def drop_parts(self, folder: Path) -> int:
        """Remove the parts in the folder of an upload, which itself stays known. Returns the bytes freed."""
        with storage_errors(self.root):
            return sum(self.blobs.drop(path, path.suffix[1:]) for path in folder.glob("*") if _is_part(path))

    def remove_folder(self, folder: Path) -> int:
        """Remove what belonged to an upload that is forgotten; returns the bytes freed."""
        freed = self.drop_parts(folder)
        with storage_errors(self.root):
            for path in folder.glob("*"):
                if not _is_part(path):
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a part came in at this very moment: a later sweep finds both
                folder.rmdir()
        return freed

    def expired(self) -> Iterator[Upload]:
        for folder in self.root.glob("*"):
            found = _read(folder)
            if found is not None and found.expires_at <= self.clock():
                yield found

    def leftovers(self) -> Iterator[Path]:
        """Folders whose upload is forgotten: a crash stopped their removal or their beginning."""
        return (folder for folder in self.root.glob("*") if not (folder / "upload.json").exists())

    def folder(self, upload_id: str) -> Path:
        return self.root / upload_id

    def _checked(self, upload: Upload, parts: Sequence[Part], limit_bytes: int | None) -> list[Path]:
        if not 1 <= len(parts) <= self.limits.max_parts:
            raise InvalidPart(f"the list has {len(parts)} parts; it needs 1 to {self.limits.max_parts}.")
        by_number = {part.number: part for part in parts}
        if len(by_number) < len(parts):
            raise InvalidPart("the list has a partNumber twice. Name each part once.")
        with storage_errors(self.root):
            paths = [self._part(upload, by_number[number]) for number in sorted(by_number)]
            total = sum(path.stat().st_size for path in paths)
        if limit_bytes is not None and total > limit_bytes:
            raise FileTooLarge(f"the parts have {total} bytes together; {limit_bytes} are allowed in one file.")
        return paths

    def _part(self, upload: Upload, part: Part) -> Path:
        if _ETAG.fullmatch(part.etag):
            path = self.folder(upload.id) / part_name(part.number, part.etag)
            if path.is_file():
                return path
        raise InvalidPart(f"part {part.number} with etag {part.etag[:80]!r} was not uploaded. Send it again.")


class FolderPartWriter:
    """`PartWriter` of the folder store."""

    def __init__(self, uploads: Uploads, folder: Path, number: int) -> None:
        self.uploads = uploads
        self.folder = folder
        self.number = number
        self.content = uploads.blobs.writer(uploads.limits.max_part_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.content.discard()

    def write(self, chunk: bytes) -> None:
        self.content.write(chunk)

    def commit(self) -> Part:
        etag = self.content.finish()
        with storage_errors(self.folder):
            try:
                self.uploads.blobs.place_alone(self.content, self.folder / part_name(self.number, etag))
            except FileNotFoundError as error:
                raise UploadNotFound("the upload was aborted while a part of it came in. Begin a new one.") from error
        return Part(self.number, etag)


def part_name(number: int, etag: str) -> str:
    return f"{number:05}.{etag}"


def _is_part(path: Path) -> bool:
    return _PART.fullmatch(path.name) is not None


def _read(folder: Path) -> Upload | None:
    match read_json(folder / "upload.json"):
        case {"key": str(key), "label": dict(label), "expires_at": float(expires_at)}:
            return Upload(folder.name, key, Label(**label), expires_at)
    return None


def _chunks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with storage_errors(path.parent), path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
