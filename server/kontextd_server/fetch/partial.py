"""A download so far, which can be taken up where it broke off. Knows files and hashes; knows no HTTP.

<name>        the bytes
<name>.json   the strong ETag of what they are the beginning of; without one nothing can be taken up
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

from kontextd_server.files.atomic import as_json, read_json
from kontextd_server.files.blobs import CHUNK_BYTES
from kontextd_server.files.errors import storage_errors

HEAD_BYTES = 1024  # as much as is kept in memory, to look at


class Partial:
    """The bytes of one URL on the disk. The caller holds the lock of that URL."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self.etag: str | None = None
        self.head = b""
        self._hash = hashlib.sha256()
        self._state = path.with_name(f"{path.name}.json")
        with storage_errors(path.parent):
            self._file = path.open("ab", buffering=CHUNK_BYTES)
            self._take_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors(self.path.parent):
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def begin(self, etag: str | None) -> None:
        """Forget what is there; what follows is a body of this ETag."""
        with storage_errors(self.path.parent):
            self._file.flush()
            self._file.truncate(0)
            self._state.write_bytes(as_json({"etag": etag}))
        self.size_bytes, self.etag, self.head, self._hash = 0, etag, b"", hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        with storage_errors(self.path.parent):
            self._file.write(chunk)
        self._count(chunk)

    def finish(self, target: Path) -> None:
        """Give the whole its name."""
        with storage_errors(self.path.parent):
            self._file.flush()
            self.path.replace(target)
            self._state.unlink(missing_ok=True)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Hash again what an earlier try left: a hash cannot be stored half way."""
        try:
            etag = (read_json(self._state) or {}).get("etag")
        except ValueError:
            etag = None  # torn by a crash
        if not isinstance(etag, str):
            self._file.truncate(0)
            return
        self.etag = etag
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.size_bytes += len(chunk)
        if len(self.head) < HEAD_BYTES:
            self.head += chunk[: HEAD_BYTES - len(self.head)]
