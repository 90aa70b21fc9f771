"""The one way to an input, whatever names it. Knows where inputs come from, and in which order; knows no jobs.

data:…           decoded
own file         linked from the file store, without HTTP
ROOT:path        of a LoRA: read where it lies
mirror           linked, whatever the network says
off-line         the end: an error that names what to add to the mirror; of a hub id also where ids are not fetched
http, hub id     downloaded by the rules of the purpose, once for all who ask at the same time
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kontextd_server.fetch import data_uri
from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.cache import DownloadCache
from kontextd_server.fetch.content import HEAD_BYTES, check_head
from kontextd_server.fetch.download import NONE, Progress
from kontextd_server.fetch.errors import InputTooLarge, InvalidReference, NotMirrored, OwnFileGone
from kontextd_server.fetch.hub import Hub
from kontextd_server.fetch.roots import LoraRoots, RootFile
from kontextd_server.fetch.urls import parse, scheme_of, without_query
from kontextd_server.fetch.web import Web
from kontextd_server.files import FileStore
from kontextd_server.files.errors import FileNotHere, storage_errors
from kontextd_server.mirror import HUB_ID, Mirror, add_command


class Source(StrEnum):
    """Where an input came from."""

    DATA_URI = "data_uri"
    OWN_FILE = "own_file"
    ROOT = "root"
    MIRROR = "mirror"
    CACHE = "cache"
    NETWORK = "network"


@dataclass(frozen=True)
class Fetched:
    """An input on the disk; nobody may write into it. `content_type` as its source stated it, "" where it did not."""

    path: Path
    sha256: str  # hex; "" of a file that is read where it lies, and was not read yet
    size_bytes: int
    content_type: str
    source: Source


class Fetcher:
    """Fetches inputs. `own_key` gives the key of a URL that is a file of this server, None for any other."""

    def __init__(
        self,
        web: Web,
        files: FileStore,
        own_key: Callable[[str], str | None],
        mirror: Mirror,
        roots: LoraRoots | None = None,
    ) -> None:
        self.web = web
        self.files = files
        self.own_key = own_key
        self.mirror = mirror
        self.roots = roots or LoraRoots()
        self.hub = Hub(web)
        self.cache = DownloadCache(web)

    def fetch(self, reference: str, purpose: Purpose, into: Path, progress: Progress | None = None) -> Fetched:
        """Make the new file `into` the input that `reference` names; a file of a root is left where it lies.

        `progress` is called often, also while waiting; what it raises ends the fetch. Raises `FetchError`, the engine's
        `ImageLoadError` and `UnsupportedImageFormat`, and `FileStoreError` where this box's own disk fails.
        """
        progress = progress or _ignore
        if scheme_of(reference) == "data":
            return self._from_data_uri(reference, purpose, into, progress)
        key = self.own_key(reference)
        if key is not None:
            return self._from_store(key, reference, purpose, into, progress)
        reference = reference.strip()
        if purpose is Purpose.LORA:
            file = self.roots.find(reference)
            if file is not None:
                return self._from_root(file, reference, purpose)
            self.roots.check_known(reference)
        found = self._from_mirror(reference, purpose, into, progress)
        if found is not None:
            return found
        self._check_may_fetch(reference, purpose)
        return self._from_network(reference, purpose, into, progress)

    def _from_data_uri(self, uri: str, purpose: Purpose, into: Path, progress: Progress) -> Fetched:
        pieces, stated = data_uri.decode(uri, self._max_bytes(purpose))
        content, size_bytes = hashlib.sha256(), 0
        with storage_errors(into.parent), into.open("wb") as file:
            for piece in _judged(_told(pieces, progress), purpose):
                content.update(piece)
                size_bytes += file.write(piece)
        return Fetched(into, content.hexdigest(), size_bytes, stated, Source.DATA_URI)

    def _from_store(self, key: str, reference: str, purpose: Purpose, into: Path, progress: Progress) -> Fetched:
        try:
            file = self.files.info(key)
            self._check_size(file.size_bytes, reference, purpose)
            self.files.copy_to(key, into, progress)
        except FileNotHere as error:
            raise OwnFileGone(f"the file {reference[:500]} is not here any more. Upload it again.") from error
        _check_file(into, purpose, reference)
        return Fetched(into, file.sha256, file.size_bytes, file.content_type, Source.OWN_FILE)

    def _from_mirror(self, reference: str, purpose: Purpose, into: Path, progress: Progress) -> Fetched | None:
        entry = self.mirror.copy_to(reference, into, progress)
        if entry is None:
            return None
        self._check_size(entry.size_bytes, reference, purpose)
        _check_file(into, purpose, reference)
        return Fetched(into, entry.sha256, entry.size_bytes, "", Source.MIRROR)

    def _from_root(self, file: RootFile, reference: str, purpose: Purpose) -> Fetched:
        self._check_size(file.size_bytes, reference, purpose)
        check_head(file.head, purpose, without_query(reference))
        return Fetched(file.path, "", file.size_bytes, "", Source.ROOT)

    def _check_may_fetch(self, reference: str, purpose: Purpose) -> None:
        """Raises `NotMirrored`, which names what would help."""
        is_hub_id = _is_hub_id(reference, purpose)
        if self.web.config.offline:
            why, or_else = f"this server is off-line and its mirror does not hold {reference[:500]}.", ""
        elif is_hub_id and not self.web.config.hub_ids:
            why = f"{reference} is a hub id, of which this server fetches none, and its mirror does not hold it."
            or_else = ", or allow hub ids with KONTEXTD_HUB_IDS=1"
        else:
            return
        if is_hub_id and self.roots.names:
            why += f" If a file of this server is meant, write ROOT:path; its roots: {', '.join(self.roots.names)}."
        self.mirror.note_missing(reference, purpose)
        raise NotMirrored(f"{why} The operator can add it{or_else}: {add_command(reference)}")

    def _from_network(self, reference: str, purpose: Purpose, into: Path, progress: Progress) -> Fetched:
        credential = NONE
        if _is_hub_id(reference, purpose):
            credential, target = self.hub.credential, self.hub.target(reference, lambda: progress(0, None))
        elif scheme_of(reference) is None:
            raise InvalidReference(f"{reference[:200]!r} is no URL; {self._remedy(purpose)}")
        else:
            target = parse(reference)
        entry, is_hit = self.cache.fetch(target, purpose, into, progress, credential)
        source = Source.CACHE if is_hit else Source.NETWORK
        return Fetched(into, entry.sha256, entry.size_bytes, entry.content_type, source)

    def _remedy(self, purpose: Purpose) -> str:
        if purpose is Purpose.LORA and self.roots.names:
            return (
                f"send an http, https or data URL, or a path in a root of this server: {', '.join(self.roots.names)}."
            )
        return "send an http, https or data URL."

    def _max_bytes(self, purpose: Purpose) -> int:
        return self.web.config.rules(purpose).max_bytes

    def _check_size(self, size_bytes: int, reference: str, purpose: Purpose) -> None:
        if size_bytes > self._max_bytes(purpose):
            raise InputTooLarge(
                f"{without_query(reference)} has {size_bytes} bytes; at most {self._max_bytes(purpose)} are allowed. "
                "Send a smaller file."
            )


def _is_hub_id(reference: str, purpose: Purpose) -> bool:
    return purpose is Purpose.LORA and HUB_ID.fullmatch(reference) is not None


def _check_file(path: Path, purpose: Purpose, reference: str) -> None:
    with storage_errors(path.parent), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    check_head(head, purpose, without_query(reference))


def _told(pieces: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    """The same pieces, each told of as it comes."""
    size_bytes = 0
    for piece in pieces:
        size_bytes += len(piece)
        progress(size_bytes, None)
        yield piece


def _judged(pieces: Iterable[bytes], purpose: Purpose) -> Iterator[bytes]:
    """The pieces of a data URI, of which none is given before its head was found good and none is read after a bad."""
    head = b""
    for piece in pieces:
        if len(head) < HEAD_BYTES:
            piece = head = head + piece
            if len(head) < HEAD_BYTES:
                continue
            check_head(head[:HEAD_BYTES], purpose, "the data URI")
        yield piece
    if len(head) < HEAD_BYTES:
        check_head(head, purpose, "the data URI")
        yield head


def _ignore(_: int, __: int | None) -> None:
    """Nobody wants to know."""
