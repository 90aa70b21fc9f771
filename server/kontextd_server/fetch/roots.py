"""LoRA files where they lie: folders of this box under names, `studio:styles/ink`. Knows folders; knows no network.

A path is taken as it is written, without unescaping. It cannot leave its folder: not by what it says, and not by a
link. Files are read in place and never copied. Messages show names of roots and what was sent, and no folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_server.fetch.content import HEAD_BYTES
from kontextd_server.fetch.errors import InvalidReference, NotInRoot, RootUnavailable, UnknownRoot

SUFFIX = ".safetensors"
LIBRARY = "library"  # the root of what `kontextd lora add` keeps
_NAME = re.compile(r"[a-z][a-z0-9_-]{1,31}")  # of one letter it would be a drive of Windows
_SCHEMES = frozenset({"http", "https", "data", "file", "ftp", "ftps", "blob", "hf", "s3", "gs"})
_MAX_PATH = 1000
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR})
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class RootFile:
    """A file of a root. `path` has no link in it; `head` are its first bytes."""

    path: Path
    size_bytes: int
    head: bytes


@dataclass(frozen=True)
class LoraRoots:
    """Folders by name. Raises `ValueError` for a name that could not be told from something else."""

    folders: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.folders:
            if not _NAME.fullmatch(name) or name in _SCHEMES:
                raise ValueError(f"{name!r} is no name for a root; use 2 to 32 of a-z, 0-9, - and _, but no URL scheme")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.folders))

    def find(self, reference: str) -> RootFile | None:
        """The file that `ROOT:path` names, with or without its ending; None for what names no root of ours.

        Raises `InvalidReference` for a path that cannot be one, `NotInRoot`, `RootUnavailable`.
        """
        name, colon, inside = reference.partition(":")
        folder = self.folders.get(name.lower()) if colon else None
        if folder is None:
            return None
        _check(reference, inside)
        return _found(folder, inside, reference)

    def check_known(self, reference: str) -> None:
        """Raises `UnknownRoot` for what is written like a path in a root, but of none that this server has."""
        name, colon, _ = reference.partition(":")
        if colon and _NAME.fullmatch(name.lower()) and name.lower() not in _SCHEMES:
            has = f"it has: {', '.join(self.names)}" if self.folders else "it has none"
            raise UnknownRoot(f"{reference[:200]!r}: this server has no LoRA root {name!r}; {has}. Check the name.")


def parse_roots(parts: Iterable[str]) -> Mapping[str, Path]:
    """Of `studio=/srv/loras`. Raises `ValueError` with the remedy."""
    folders: dict[str, Path] = {}
    for part in parts:
        name, equals, text = (piece.strip() for piece in part.partition("="))
        path = Path(text).expanduser()
        if not equals or not path.is_absolute():
            raise ValueError(f"{part!r} is no NAME=/absolute/folder")
        if name == LIBRARY or name in folders:
            raise ValueError(f"the name {name!r} is taken; use another")
        folders[name] = path
    LoraRoots(folders)
    return folders


def _check(reference: str, inside: str) -> None:
    parts = inside.split("/")
    if len(inside) > _MAX_PATH or _FORBIDDEN.search(inside) or any(not part or part.startswith(".") for part in parts):
        raise InvalidReference(
            f"{reference[:200]!r} is no path in a root. Write ROOT:folder/name with forward slashes, without a leading "
            f"one, and without '..' and hidden names."
        )


def _found(folder: Path, inside: str, reference: str) -> RootFile:
    shown, name = repr(reference[:200]), reference.partition(":")[0]
    try:
        base = os.path.realpath(folder, strict=True)
    except OSError as error:
        if name.lower() == LIBRARY and isinstance(error, FileNotFoundError):  # it is made with the first file
            raise _absent(shown, name) from error
        raise _away(shown, name) from error
    for candidate in (inside, f"{inside}{SUFFIX}"):
        try:
            found = _opened(base, candidate)
        except PermissionError as error:
            raise NotInRoot(f"{shown} may not be read by this server. Its operator must allow it.") from error
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _away(shown, name) from error
            continue
        except ValueError:  # half a surrogate pair, which no file's name holds
            continue
        if found is not None:
            return found
    raise _absent(shown, name)


def _absent(shown: str, name: str) -> NotInRoot:
    told = f"{shown}: the root {name!r} holds no such file"
    return NotInRoot(f"{told}. Write it as it lies there; {SUFFIX} may be left out.")


def _away(shown: str, name: str) -> RootUnavailable:
    told = f"{shown}: the root {name!r} cannot be read now"
    return RootUnavailable(f"{told}. The operator of this server must see to its folder.")


def _opened(base: str, inside: str) -> RootFile | None:
    """None for what is no plain file, or lies outside `base` once all links are followed."""
    real = os.path.realpath(os.path.join(base, inside), strict=True)
    if os.path.commonpath((base, real)) != base or not stat.S_ISREG(os.stat(real).st_mode):
        return None
    # Not blocking: it may have become a pipe, which nobody writes into, since it was looked at.
    with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        kept = os.fstat(file.fileno())
        return RootFile(Path(real), kept.st_size, file.read(HEAD_BYTES)) if stat.S_ISREG(kept.st_mode) else None
