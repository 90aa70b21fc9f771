"""Secrets in files: made once, readable by their owner alone. Knows files; knows no keys."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_OTHERS = 0o077


def load_or_create(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file; where there is none it is made, whole or not at all, with the mode 0600.

    Of several processes that make it at once one wins, and all of them get its content.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        _create(path, make())
        return _read(path)


def write_private(path: Path, content: bytes) -> None:
    """Replace a file by one of the mode 0600: whole, or not at all."""
    draft = _draft(path, content)
    os.replace(draft, path)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & _OTHERS:
            log.warning("%s can be read by others than its owner; chmod 600 it.", path)
        return file.read()


def _create(path: Path, content: bytes) -> None:
    draft = _draft(path, content)
    try:
        os.link(draft, path)  # unlike a rename, it does not replace what another process has made
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _draft(path: Path, content: bytes) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return draft
