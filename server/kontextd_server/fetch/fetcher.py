"""The one way to an input: a `data:` URI, a file of ours, the mirror, the network, in this order. Knows no jobs.

data:…           decoded
own file         linked from the file store, without HTTP
mirror           linked, whatever the network says
off-line         the end: an error that names what to add to the mirror
http, hub id     downloaded by the rules of the purpose, once for all who ask at the same time
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kontextd_server.fetch import data_uri
from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.cache import DownloadCache
from kontextd_server.fetch.content import HEAD_BYTES, check_head
from kontextd_server.fetch.download import Progress
from kontextd_server.fetch.errors import InputTooLarge, InvalidReference, NotMirrored, OwnFileGone
from kontextd_server.fetch.urls import Target, parse, scheme_of
from kontextd_server.fetch.web import Web
from kontextd_server.files import FileStore
from kontextd_server.files.errors import FileNotHere, storage_errors
from kontextd_server.mirror import HUB_ID, Mirror, add_command

_HUB_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the weights of a LoRA that names no file


class Source(StrEnum):
    """Where an input came from."""

    DATA_URI = "data_uri"
    OWN_FILE = "own_file"
    MIRROR = "mirror"
    CACHE = "cache"
    NETWORK = "network"


@dataclass(frozen=True)
class Fetched:
    """An input on the disk; nobody may write into it. `content_type` as its source stated it, "" where it did not."""

    path: Path
    sha256: str  # hex
    size_bytes: int
    content_type: str
    source: Source


class Fetcher:
    """Fetches inputs. `own_key` gives the key of a URL that is a file of this server, None for any other."""

    def __init__(self, web: Web, files: FileStore, own_key: Callable[[str], str | None], mirror: Mirror) -> None:
        self.web = web
        self.files = files
        self.own_key = own_key
        self.mirror = mirror
        self.cache = DownloadCache(web)

    def fetch(self, reference: str, purpose: Purpose, into: Path, progress: Progress | None = None) -> Fetched:
        """Make the new file `into` the input that `reference` names.

        `progress` is called often, also while waiting; what it raises ends the fetch. Raises `FetchError`, the engine's
        `ImageLoadError` and `UnsupportedImageFormat`, and `FileStoreError` where this box's own disk fails.
        """
        if scheme_of(reference) == "data":
            return self._from_data_uri(reference, purpose, into)
        key = self.own_key(reference)
        if key is not None:
            return self._from_store(key, reference, purpose, into)
        reference = reference.strip()
        found = self._from_mirror(reference, purpose, into)
        if found is not None:
            return found
        if self.web.config.offline:
            self.mirror.note_missing(reference, purpose)
            raise NotMirrored(
                f"this server is off-line and its mirror does not hold {reference[:500]}. "
                f"The operator can add it: {add_command(reference)}"
            )
        return self._from_network(self._target(reference, purpose), purpose, into, progress or _ignore)

    def _from_data_uri(self, uri: str, purpose: Purpose, into: Path) -> Fetched:
        data, stated = data_uri.decode(uri, self._max_bytes(purpose))
        check_head(data[:HEAD_BYTES], purpose, "the data URI")
        with storage_errors(into.parent):
            into.write_bytes(data)
        return Fetched(into, hashlib.sha256(data).hexdigest(), len(data), stated, Source.DATA_URI)

    def _from_store(self, key: str, reference: str, purpose: Purpose, into: Path) -> Fetched:
        try:
            file = self.files.info(key)
            self._check_size(file.size_bytes, reference, purpose)
            self.files.copy_to(key, into)
        except FileNotHere as error:
            raise OwnFileGone(f"the file {reference[:500]} is not here any more. Upload it again.") from error
        _check_file(into, purpose, reference)
        return Fetched(into, file.sha256, file.size_bytes, file.content_type, Source.OWN_FILE)

    def _from_mirror(self, reference: str, purpose: Purpose, into: Path) -> Fetched | None:
        entry = self.mirror.copy_to(reference, into)
        if entry is None:
            return None
        self._check_size(entry.size_bytes, reference, purpose)
        _check_file(into, purpose, reference)
        return Fetched(into, entry.sha256, entry.size_bytes, "", Source.MIRROR)

    def _from_network(self, target: Target, purpose: Purpose, into: Path, progress: Progress) -> Fetched:
        entry, is_hit = self.cache.fetch(target, purpose, into, progress)
        source = Source.CACHE if is_hit else Source.NETWORK
        return Fetched(into, entry.sha256, entry.size_bytes, entry.content_type, source)

    def _target(self, reference: str, purpose: Purpose) -> Target:
        hub_id = HUB_ID.fullmatch(reference)
        if purpose is Purpose.LORA and hub_id:
            return parse(f"{self.web.config.hub}/{hub_id[1]}/resolve/main/{hub_id[2] or _HUB_FILE}")
        if scheme_of(reference) is None:
            raise InvalidReference(f"{reference[:200]!r} is no URL; send an http, https or data URL.")
        return parse(reference)

    def _max_bytes(self, purpose: Purpose) -> int:
        return self.web.config.rules(purpose).max_bytes

    def _check_size(self, size_bytes: int, reference: str, purpose: Purpose) -> None:
        if size_bytes > self._max_bytes(purpose):
            raise InputTooLarge(
                f"{reference[:500]} has {size_bytes} bytes; at most {self._max_bytes(purpose)} are allowed. "
                "Send a smaller file."
            )


def _check_file(path: Path, purpose: Purpose, reference: str) -> None:
    with storage_errors(path.parent), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    check_head(head, purpose, reference[:500])


def _ignore(_: int, __: int | None) -> None:
    """Nobody wants to know."""
