"""Downloads kept on this box: one at a time for each URL, shared by all who wait for it. Knows no data URIs, no mirror.

    <purpose>/entries/<hash of URL>.json   what is known of a finished download
    <purpose>/contents/<hash of URL>       its bytes
    <purpose>/parts/, locks/               downloads under way

Whoever gets a file gets a hard link of his own, so that nothing is taken from under a job when an entry goes.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kontextd_models.errors import InputError

from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.download import NONE, Credential, Downloaded, Progress, Wanted, download
from kontextd_server.fetch.errors import DownloadFailed, DownloadTimedOut, FetchError
from kontextd_server.fetch.network import Deadline
from kontextd_server.fetch.partial import Partial
from kontextd_server.fetch.rules import PurposeRules
from kontextd_server.fetch.urls import Target
from kontextd_server.fetch.web import Web
from kontextd_server.files.atomic import as_json, make_folder, read_json, replace_whole
from kontextd_server.files.blobs import link_or_copy
from kontextd_server.files.errors import storage_errors
from kontextd_server.files.locks import LockTimeout, exclusive_and_gone


@dataclass(frozen=True)
class Entry:
    """A finished download. `checked_at`: when its server last said that it is current, in seconds since the epoch."""

    url: str
    sha256: str
    size_bytes: int
    content_type: str
    etag: str | None
    last_modified: str | None
    checked_at: float


class DownloadCache:
    """Downloads of all purposes below one folder."""

    def __init__(self, web: Web) -> None:
        self.web = web

    def fetch(
        self, target: Target, purpose: Purpose, into: Path, progress: Progress, credential: Credential = NONE
    ) -> tuple[Entry, bool]:
        """Make `into` a file of what `target` gives; True where nothing had to be asked for. Raises `FetchError`."""
        rules, asked_at = self.web.config.rules(purpose), time.time()

        def waiting() -> None:
            progress(0, None)

        wanted = Wanted(target, purpose, Deadline(rules.total_s, waiting), progress, credential)
        shelf = Shelf(self.web.config.cache / purpose)
        name = hashlib.sha256(target.url.encode("ascii")).hexdigest()
        with storage_errors(shelf.root):
            shelf.make()
            try:
                with exclusive_and_gone(shelf.lock(name), rules.total_s, on_wait=waiting):
                    # A download that came to its end after we asked serves us too, however fresh it has to be.
                    entry, is_hit = self._current(shelf, name, wanted, newer_than=asked_at - rules.fresh_s)
                    try:
                        link_or_copy(shelf.content(name), into, progress)
                    except FileNotFoundError:  # tidied away by another process at this very moment
                        entry, is_hit = self._current(shelf, name, wanted, newer_than=math.inf)
                        link_or_copy(shelf.content(name), into, progress)
                    os.utime(shelf.content(name))
            except LockTimeout as error:
                raise DownloadTimedOut(f"{target}: somebody else's download of it did not end in time.") from error
            if not is_hit:
                shelf.tidy(rules, self.web.config.cache_bytes)
        return entry, is_hit

    def tidy(self) -> None:
        """Remove what has been kept for long enough; any process may call it at any time."""
        for purpose in Purpose:
            shelf = Shelf(self.web.config.cache / purpose)
            with storage_errors(shelf.root):
                shelf.tidy(self.web.config.rules(purpose), self.web.config.cache_bytes)

    def _current(self, shelf: Shelf, name: str, wanted: Wanted, newer_than: float) -> tuple[Entry, bool]:
        known = shelf.entry(name)
        if known is not None and known.checked_at >= newer_than:
            return known, True
        with Partial(shelf.part(name)) as partial:
            try:
                said = self._downloaded(wanted, partial, _validators(known))
            except DownloadFailed:
                raise  # what is there may be taken up by the next who asks
            except (FetchError, InputError):
                partial.discard()  # the wrong thing, and so would be what follows
                raise
            if known is not None and said.is_unchanged:
                partial.discard()
                entry = replace(known, checked_at=time.time())
            else:
                entry = _described(wanted.target, partial, said)
                shelf.forget(name)  # at no moment does an entry describe another content
                partial.finish(shelf.content(name))
        shelf.record(name, entry)
        return entry, False

    def _downloaded(self, wanted: Wanted, partial: Partial, validators: Mapping[str, str]) -> Downloaded:
        """Begins anew where a server will not go on from what is there: that may be all of it (RFC 9110, 15.5.17)."""
        is_taken_up = partial.size_bytes > 0
        try:
            return download(self.web, wanted, partial, validators)
        except DownloadFailed as error:
            if not is_taken_up or error.transient or isinstance(error, DownloadTimedOut):
                raise
            partial.begin(None)
            return download(self.web, wanted, partial, validators)


class Shelf:
    """The files of one purpose."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> None:
        for name in ("entries", "contents", "parts", "locks"):
            make_folder(self.root / name)

    def entry(self, name: str) -> Entry | None:
        """None too where its content is gone, or it was written by another version."""
        try:
            values = read_json(self._entry(name))
            # Any: the file was written from this class; whatever else it may hold is refused just here.
            entry = None if values is None else Entry(**values)  # type: ignore[arg-type]
            return entry if entry and self.content(name).stat().st_size == entry.size_bytes else None
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def record(self, name: str, entry: Entry) -> None:
        replace_whole(self._entry(name), as_json(asdict(entry)))

    def forget(self, name: str) -> None:
        self._entry(name).unlink(missing_ok=True)
        self.content(name).unlink(missing_ok=True)

    def content(self, name: str) -> Path:
        return self.root / "contents" / name

    def part(self, name: str) -> Path:
        return self.root / "parts" / name

    def lock(self, name: str) -> Path:
        return self.root / "locks" / name

    def tidy(self, rules: PurposeRules, budget_bytes: int) -> None:
        """Remove what nobody used for `keep_s`, then what was used longest ago until the rest fits the budget."""
        oldest = time.time() - rules.keep_s
        for path, found in _files(self.root / "parts"):
            if found.st_mtime < oldest:
                path.unlink(missing_ok=True)
        contents = sorted(_files(self.root / "contents"), key=lambda each: each[1].st_mtime)
        total = sum(found.st_size for _, found in contents)
        for path, found in contents:
            if found.st_mtime >= oldest and total <= budget_bytes:
                break
            self.forget(path.name)
            total -= found.st_size

    def _entry(self, name: str) -> Path:
        return self.root / "entries" / f"{name}.json"


def _described(target: Target, partial: Partial, said: Downloaded) -> Entry:
    return Entry(
        url=target.url,
        sha256=partial.sha256,
        size_bytes=partial.size_bytes,
        content_type=said.content_type,
        etag=said.etag,
        last_modified=said.last_modified,
        checked_at=time.time(),
    )


def _validators(known: Entry | None) -> dict[str, str]:
    """The fields with which a server can say that what we have still holds (RFC 9110, 13.1)."""
    if known is not None and known.etag:
        return {"If-None-Match": known.etag}
    if known is not None and known.last_modified:
        return {"If-Modified-Since": known.last_modified}
    return {}


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*"):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue
