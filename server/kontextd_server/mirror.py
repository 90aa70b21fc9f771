"""The mirror: what a URL or hub id stands for on a box without a network. Knows files; knows no network, no formats.

    mirror/entries/<hash of URL>.json            what the URL stands for
    mirror/contents/<hash of URL>.<sha256>       its bytes; equal ones are stored once (files/blobs.py)
    mirror/missing/<hash of URL>.json            what was asked for and not found

One file for each URL, replaced in one step: readers need no lock, on however many boxes; who changes the mirror holds
one. It has no expiry and no quota: what an operator put there stays until he removes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kontextd_models.errors import KontextdError

from kontextd_server.files.atomic import as_json, make_folder, read_json, replace_whole
from kontextd_server.files.blobs import CHUNK_BYTES, BlobFolder, CopyProgress, link_or_copy
from kontextd_server.files.errors import FileStoreError, StoreUnavailable, storage_errors
from kontextd_server.files.locks import LockTimeout, exclusive

log = logging.getLogger(__name__)

# owner/name, and perhaps a file in it; the groups are the repository and the file.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:/((?!.*\.\.)[\w.][\w./-]{0,255}))?", re.ASCII)
_URL = re.compile(r"https?://[^\s\x00-\x1f\x7f]{1,8000}", re.IGNORECASE)
_MAX_MISSING = 1000
_MAX_URL = 8192
_LOCK_TIMEOUT_S = 30.0
_TOLD = 10  # mistakes of a list, in one message


class MirrorError(KontextdError):
    """A mistake of the operator: an address, a file or a list that cannot be taken. The message says which and why."""


@dataclass(frozen=True)
class Mirrored:
    """What a URL stands for. `added_at` in seconds since the epoch."""

    url: str
    sha256: str
    size_bytes: int
    file_name: str
    added_at: float


@dataclass(frozen=True)
class Missing:
    """A URL that was asked for and is not here. Times in seconds since the epoch."""

    url: str
    purpose: str
    first_at: float
    last_at: float


class Mirror:
    """The mirror in the folder of files `files`, which is only made when something is added."""

    def __init__(self, files: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = files / "mirror"
        self.clock = clock
        self.blobs = BlobFolder(self.root)

    def find(self, url: str) -> Mirrored | None:
        """What exactly this URL or hub id stands for."""
        with storage_errors(self.root):
            return _entry(self._entry_path(url))

    def copy_to(self, url: str, path: Path, progress: CopyProgress | None = None) -> Mirrored | None:
        """Make `path` a file of what the URL stands for; None where it is not here. See `link_or_copy`."""
        with storage_errors(self.root):
            for _ in range(2):  # it may be replaced between the two steps
                entry = _entry(self._entry_path(url))
                if entry is None:
                    return None
                try:
                    link_or_copy(self._content(entry), path, progress)
                except FileNotFoundError:
                    continue
                return entry
        raise StoreUnavailable(f"the mirrored file of {url[:500]} is lost. Add it again: {add_command(url)}")

    def add(self, url: str, file: Path) -> Mirrored:
        """Let `url` stand for a copy of `file`, whatever it stood for before. Raises `MirrorError`."""
        _check(url, file)
        with self.blobs.writer() as content:
            _copy(file, content.write)
            entry = Mirrored(url, content.finish(), content.size_bytes, file.name, self.clock())
            with self._changing():
                before = _entry(self._entry_path(url))
                self.blobs.place(content, self._content(entry))
                make_folder(self.root / "entries")
                replace_whole(self._entry_path(url), as_json(asdict(entry)))
                if before is not None and before.sha256 != entry.sha256:
                    self.blobs.drop(self._content(before), before.sha256)
                self._missing_path(url).unlink(missing_ok=True)
        return entry

    def remove(self, url: str) -> bool:
        """False where it was not here."""
        if self.find(url) is None:
            return False
        with self._changing():
            entry = _entry(self._entry_path(url))
            if entry is None:
                return False
            self._entry_path(url).unlink()
            self.blobs.drop(self._content(entry), entry.sha256)
        return True

    def sweep(self, grace_s: float = 3600.0) -> int:
        """Remove what jobs still held when it was replaced or removed, and what crashes left; returns bytes freed."""
        newest = time.time() - grace_s
        with self._changing():
            kept = {self._content(entry) for entry in self.entries()}
            left = [path for path in (self.root / "contents").glob("*") if path not in kept]
            for path in [*left, *(self.root / "tmp").glob("*")]:
                if path.stat().st_ctime <= newest:
                    path.unlink(missing_ok=True)
            return sum(self.blobs.drop_unkept(blob) for blob in (self.root / "blobs").glob("??/*"))

    def entries(self) -> list[Mirrored]:
        """All, by URL."""
        with storage_errors(self.root):
            found = map(_entry, (self.root / "entries").glob("*.json"))
            return sorted((entry for entry in found if entry), key=lambda entry: entry.url)

    def import_list(self, path: Path) -> list[Mirrored]:
        """Add what a text file lists, one `URL FILE` a line; `#` begins a comment, files lie beside the list.

        All lines are checked before the first is added. Raises `MirrorError` naming the lines at fault.
        """
        rows, mistakes = [], []
        for number, line in _lines(path):
            url, _, name = line.partition(" ")
            file = path.parent / name.strip()
            try:
                _check(url, file)
            except MirrorError as error:
                mistakes.append(f"line {number}: {error}")
            rows.append((url, file))
        if mistakes:
            more = f" And {len(mistakes) - _TOLD} more." if len(mistakes) > _TOLD else ""
            raise MirrorError(f"nothing of {path} was added. {' '.join(mistakes[:_TOLD])}{more}")
        return [self.add(url, file) for url, file in rows]

    def note_missing(self, url: str, purpose: str) -> None:
        """Remember that a URL was asked for; the latest 1000. A disk that cannot take the note is logged."""
        if len(url) > _MAX_URL:
            return
        try:
            with storage_errors(self.root):
                known = _missing(self._missing_path(url))
                now = self.clock()
                note = Missing(url, purpose, known.first_at if known else now, now)
                make_folder(self.root / "missing")
                replace_whole(self._missing_path(url), as_json(asdict(note)))
                if known is None:
                    self._forget_oldest()
        except FileStoreError as error:
            log.warning("a URL missing in the mirror could not be noted: %s", error)

    def missing(self) -> list[Missing]:
        """What was asked for and is not here, the latest first."""
        with storage_errors(self.root):
            found = map(_missing, (self.root / "missing").glob("*.json"))
            notes = sorted((note for note in found if note), key=lambda note: -note.last_at)
            return [note for note in notes if _entry(self._entry_path(note.url)) is None]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with storage_errors(self.root):
            try:
                with exclusive(make_folder(self.root) / "lock", _LOCK_TIMEOUT_S):
                    yield
            except LockTimeout as error:
                raise StoreUnavailable(f"the mirror cannot be changed: {error}") from error

    def _forget_oldest(self) -> None:
        notes = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(self.root / "missing")]
        for _, path in sorted(notes)[:-_MAX_MISSING]:
            Path(path).unlink(missing_ok=True)

    def _entry_path(self, url: str) -> Path:
        return self.root / "entries" / f"{_hash(url)}.json"

    def _missing_path(self, url: str) -> Path:
        return self.root / "missing" / f"{_hash(url)}.json"

    def _content(self, entry: Mirrored) -> Path:
        return self.root / "contents" / f"{_hash(entry.url)}.{entry.sha256}"


def add_command(url: str) -> str:
    """What an operator types to add a URL."""
    return f"kontextd mirror add {shlex.quote(url[:_MAX_URL])} FILE"


def _check(url: str, file: Path) -> None:
    if not _URL.fullmatch(url) and not HUB_ID.fullmatch(url):
        raise MirrorError(f"{url[:200]!r} is neither an http(s) URL nor a hub id such as owner/name.")
    if not file.is_file():
        raise MirrorError(f"{file} is no file; check the path.")
    if not file.stat().st_size:
        raise MirrorError(f"{file} is empty; check how it was copied.")


def _copy(file: Path, write: Callable[[bytes], None]) -> None:
    try:
        with file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                write(chunk)
    except OSError as error:
        raise MirrorError(f"{file} cannot be read: {error.strerror}.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MirrorError(f"the list {path} cannot be read: {error}.") from error
    for number, line in enumerate(text.splitlines(), 1):
        row = line.replace("\t", " ").strip()
        if row and not row.startswith("#"):
            yield number, row


def _hash(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _entry(path: Path) -> Mirrored | None:
    values = _values(path)
    return Mirrored(**values) if values else None  # type: ignore[arg-type]  # Any: written from this class


def _missing(path: Path) -> Missing | None:
    values = _values(path)
    return Missing(**values) if values else None  # type: ignore[arg-type]  # Any: written from this class


def _values(path: Path) -> Mapping[str, object] | None:
    try:
        return read_json(path)
    except ValueError as error:
        raise StoreUnavailable(f"{path} is damaged: {error}. Remove it and add its URL again.") from error
