"""Small files that are there whole or not at all, whatever crashes. Knows rename, link and fsync; knows no content."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

PRIVATE = 0o700  # folders of pictures that belong to somebody


def make_folder(path: Path) -> Path:
    """The folder, made with its parents where absent."""
    if not path.is_dir():
        make_folder(path.parent)  # mkdir's own `parents` gives the mode to the last one alone
        path.mkdir(mode=PRIVATE, exist_ok=True)
        sync_folder(path.parent)
    return path


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk: without it a crash can undo a rename that was reported as done."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_whole(path: Path, data: bytes) -> None:
    """Write `path`; a reader meets the old content or the new, never a part."""
    temp = _written_beside(path, data)
    try:
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def create_whole(path: Path, data: bytes) -> None:
    """Write a new `path`; of several writers one wins. Raises `FileExistsError` in all others."""
    temp = _written_beside(path, data)
    try:
        link_or_move(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def link_or_move(source: Path, target: Path) -> None:
    """Give `source` the new name `target`; the old one is gone afterwards. Raises `FileExistsError`.

    link(2) refuses an existing target, which rename(2) would overwrite. Where the file system has no hard links, an
    empty file made exclusively reserves the name, and the rename replaces it.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        try:
            source.replace(target)
        except BaseException:
            target.unlink()
            raise
    else:
        source.unlink()


def read_json(path: Path) -> Mapping[str, object] | None:
    """The object in a file of ours; None where the file is absent, or a reserved name still empty."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    found = json.loads(text) if text else None
    return found if isinstance(found, dict) else None


def as_json(values: Mapping[str, object]) -> bytes:
    """In ASCII, so that any name, lone surrogates included, comes back as it was."""
    return json.dumps(values).encode("ascii")


def _written_beside(path: Path, data: bytes) -> Path:
    temp = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    return temp
