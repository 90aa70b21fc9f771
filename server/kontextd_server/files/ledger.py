"""A number of bytes that threads, processes and boxes count together. Knows no files but its own.

Whoever adds or removes bytes does so while he holds the count, so that whenever nobody holds it, it is what lies on the
disk, unless a process was killed in between. For that there is `correct`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kontextd_server.files.errors import StoreUnavailable
from kontextd_server.files.locks import LockTimeout, exclusive

log = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 10.0  # it is held for some links and unlinks; longer means that the folder itself hangs
_FORM = re.compile(rb"(\d{20}) (\d{20})")


@dataclass(frozen=True)
class Snapshot:
    """The count, and how often it has been held: unchanged between two looks, nothing was changed at all."""

    total_bytes: int
    changes: int


class Held:
    """The count while it is held; what `total_bytes` is at the end is written."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes


class Ledger:
    """The count lies in one small file of fixed width, written in place: no room is needed to count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def snapshot(self) -> Snapshot:
        try:
            return self._parsed(self.path.read_bytes())
        except FileNotFoundError:
            return Snapshot(0, 0)

    @contextmanager
    def held(self) -> Iterator[Held]:
        with self._locked() as descriptor:
            found = self._parsed(os.pread(descriptor, 64, 0))
            held = Held(found.total_bytes)
            try:
                yield held
            finally:  # after a failure too: something may have been there for a moment
                self._write(descriptor, Snapshot(max(0, held.total_bytes), found.changes + 1))

    def correct(self, expected: Snapshot, total_bytes: int) -> bool:
        """Replace the count, unless somebody held it since it was `expected`: then False."""
        with self._locked() as descriptor:
            if self._parsed(os.pread(descriptor, 64, 0)) != expected:
                return False
            self._write(descriptor, Snapshot(total_bytes, expected.changes + 1))
            return True

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            with exclusive(self.path, _LOCK_TIMEOUT_S) as descriptor:
                yield descriptor
        except LockTimeout as error:
            raise StoreUnavailable(f"the count of bytes cannot be changed: {error}") from error

    def _write(self, descriptor: int, snapshot: Snapshot) -> None:
        os.pwrite(descriptor, b"%020d %020d" % (snapshot.total_bytes, snapshot.changes), 0)

    def _parsed(self, text: bytes) -> Snapshot:
        found = _FORM.fullmatch(text)
        if found:
            return Snapshot(int(found[1]), int(found[2]))
        if text:
            log.warning("%s holds %r: counted as 0 until the next sweep counts anew", self.path, text)
        return Snapshot(0, 0)
