"""Names of files: unguessable public keys, and what is left of a hostile file name. Pure; knows no disk.

A key is `<token>-<safe name>`: 26 characters of chance (128 bits), then ASCII letters, digits, `.`, `_` and `-`. It is
one path component, the same in a URL and on any file system, and says nothing that its owner did not choose to say.
"""

from __future__ import annotations

import base64
import re
import secrets

from kontextd_server.files.errors import FileNotHere

UNKNOWN_TYPE = "application/octet-stream"
_TOKEN = "[a-z2-7]{26}"
_KEY = re.compile(rf"({_TOKEN})-[A-Za-z0-9._-]{{1,100}}")
_MAX_NAME = 80  # characters of a safe name, its ending included
_MAX_ENDING = 12
_MAX_STATED_NAME = 255
_HEADER_TEXT = re.compile(r"[\x20-\x7e]{1,255}")


def new_token() -> str:
    """128 bits from the operating system, in the alphabet of RFC 4648 base32, lower case for all file systems."""
    return base64.b32encode(secrets.token_bytes(16)).decode("ascii").rstrip("=").lower()


def new_key(file_name: str) -> str:
    return f"{new_token()}-{safe_name(file_name)}"


def token_of(key: str) -> str:
    """The part of a key that names its files on the disk. Raises `FileNotHere` for whatever is no key."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise FileNotHere(f"there is no file {key[:120]!r}. It may have expired.")
    return found[1]


def safe_name(stated: str) -> str:
    """What may stand in a URL and a folder of any stated name: its last component, in 1 to 80 harmless characters."""
    last = re.split(r"[/\\]", stated.rstrip("/\\"))[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last)
    stem, _, ending = plain.rpartition(".")
    if not stem or len(ending) > _MAX_ENDING:
        stem, ending = plain, ""
    stem = re.sub(r"\.{2,}", ".", stem).strip(".-_")[: _MAX_NAME - _MAX_ENDING - 1].rstrip(".-_") or "file"
    ending = ending.strip("-_")
    return f"{stem}.{ending}" if ending else stem


def stated_name(text: str) -> str:
    """The uploader's own name for the file, kept only to be shown."""
    return text[:_MAX_STATED_NAME]


def stated_type(text: str) -> str:
    """The content type as stated; one that could not stand in a header is unknown."""
    return text if _HEADER_TEXT.fullmatch(text) and text.strip() == text else UNKNOWN_TYPE
