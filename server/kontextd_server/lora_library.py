"""The library: LoRA files that an operator keeps on this box under names. Knows files and records; knows no formats.

    loras/NAME.safetensors      the file
    loras/NAME.json             what was found when it was added; what has none is not listed

A name stands for one content from `add` to `remove`. Files come and go whole: a reader needs no lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kontextd_models.errors import KontextdError

from kontextd_server.fetch.roots import LIBRARY, SUFFIX
from kontextd_server.files.atomic import as_json, link_or_move, make_folder, read_json, replace_whole, sync_folder
from kontextd_server.files.blobs import CHUNK_BYTES
from kontextd_server.files.errors import StoreUnavailable, storage_errors
from kontextd_server.files.locks import LockTimeout, exclusive

if TYPE_CHECKING:
    from kontextd_models.lora.inspection import Inspection

log = logging.getLogger(__name__)

# As a part of a path in a root, and no more of it: see `fetch.roots`. Half a surrogate pair is in no file's name.
_NAME = re.compile(r"(?!\.)[^/\\:\x00-\x1f\x7f\ud800-\udfff]{1,100}")
_MAX_NAME_BYTES = 200  # file systems allow 255, of which the ending takes some
_LOCK_TIMEOUT_S = 30.0


class LibraryError(KontextdError):
    """A mistake of the operator: a name or a file that cannot be taken. The message says which and why."""


@dataclass(frozen=True)
class KeptLora:
    """A file of the library. `matched` of its `total` tensors have a place in `model`, which it was held against.

    `rank` is the commonest, None where its form has none. `added_at` in seconds since the epoch.
    """

    name: str
    sha256: str
    size_bytes: int
    dialects: tuple[str, ...]
    rank: int | None
    trigger_words: tuple[str, ...]
    matched: int
    total: int
    model: str
    added_at: float

    @property
    def path(self) -> str:
        """What a request calls it."""
        return f"{LIBRARY}:{self.name}"


class LoraLibrary:
    """The library in the folder `root`, which is only made when something is added."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock

    def add(self, file: Path, found: Inspection, model: str, name: str | None = None) -> KeptLora:
        """Keep a copy of `file`, which was inspected against `model`, under `name` or its own.

        Raises `LibraryError` for what the model cannot use, and for a name that stands for something else already.
        """
        name = _checked_name(file.name if name is None else name)
        if found.problem:
            raise LibraryError(f"{found.problem} Nothing was added.")
        kept = KeptLora(
            name=name,
            sha256=found.sha256,
            size_bytes=found.size_bytes,
            dialects=found.coverage.dialects,
            rank=None if found.ranks is None else found.ranks.most_common,
            trigger_words=found.description.trigger_words,
            matched=found.coverage.matched,
            total=found.coverage.total,
            model=model,
            added_at=self._clock(),
        )
        with storage_errors(self.root), self._copied(file, found.sha256) as copy, self._changing():
            return self._named(copy, kept)

    def remove(self, name: str) -> bool:
        """False where there is no such file. Whoever is reading it reads on."""
        name = _checked_name(name)
        if not self._file(name).exists():
            return False
        with storage_errors(self.root), self._changing():
            try:
                self._file(name).unlink()
            except FileNotFoundError:
                return False
            self._record(name).unlink(missing_ok=True)
        return True

    def files(self) -> list[KeptLora]:
        """All, by name."""
        with storage_errors(self.root):
            names = sorted(path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
            return [kept for name in names if (kept := self._kept(name)) is not None]

    def _named(self, copy: Path, kept: KeptLora) -> KeptLora:
        there = self._kept(kept.name)
        if there is not None and there.sha256 == kept.sha256:
            return there
        if self._file(kept.name).exists():
            raise LibraryError(
                f"{kept.path} stands for another file. Choose another name with --name, or first remove that one: "
                f"kontextd lora remove {kept.name!r}"
            )
        replace_whole(self._record(kept.name), as_json(asdict(kept)))
        link_or_move(copy, self._file(kept.name))
        sync_folder(self.root)
        return kept

    @contextmanager
    def _copied(self, file: Path, sha256: str) -> Iterator[Path]:
        """A copy in the library's folder without a name of its own, gone afterwards."""
        copy = make_folder(self.root) / f".{secrets.token_hex(8)}.part"
        try:
            if _copy(file, copy) != sha256:
                raise LibraryError(f"{file} changed while it was copied. Add it again once it is whole.")
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with exclusive(self.root / ".lock", _LOCK_TIMEOUT_S):
                yield
        except LockTimeout as error:
            raise StoreUnavailable(f"the library cannot be changed: {error}") from error

    def _kept(self, name: str) -> KeptLora | None:
        try:
            values = read_json(self._record(name))
            kept = None if values is None else _from_json(values)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("the record of %s in the library is damaged, so it is not listed: %s", name, error)
            return None
        return kept if kept is not None and self._file(name).exists() else None

    def _file(self, name: str) -> Path:
        return self.root / f"{name}{SUFFIX}"

    def _record(self, name: str) -> Path:
        return self.root / f"{name}.json"


def _checked_name(text: str) -> str:
    name = text.removesuffix(SUFFIX)
    if not _NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise LibraryError(
            f"{text!r} is no name for the library: 1 to 100 characters of at most {_MAX_NAME_BYTES} bytes together, no "
            "slash, backslash or colon, no dot at its beginning. Choose one with --name."
        )
    return name


def _from_json(values: Mapping[str, object]) -> KeptLora:
    read: dict[str, Any] = dict(values)  # Any: each value has the type of its field; whatever else, is refused here
    lists = {name: tuple(map(str, read[name])) for name in ("dialects", "trigger_words")}
    return KeptLora(**{**read, **lists})


def _copy(source: Path, target: Path) -> str:
    """Returns the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as written:
        while chunk := read.read(CHUNK_BYTES):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()
