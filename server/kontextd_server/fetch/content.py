"""Is it what it was fetched as? Decided by the first bytes; a stated content type proves nothing. Knows no network."""

from __future__ import annotations

import re

from kontextd_models.errors import ImageLoadError, InputError, UnsupportedImageFormat
from kontextd_models.image_formats import HEAD_BYTES, identify

from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.errors import NotWeights

__all__ = ["HEAD_BYTES", "check_head"]

# A safetensors file begins with the length of its header (8 bytes, little-endian) and that header, a JSON object.
_SAFETENSORS = re.compile(rb".{6}\0\0\{", re.DOTALL)
_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


def check_head(head: bytes, purpose: Purpose, where: str) -> None:
    """Refuse at the first `HEAD_BYTES` (or all there is) what could never serve.

    Raises `ImageLoadError`, `UnsupportedImageFormat`, `NotWeights`; a file that breaks later is its reader's business.
    """
    if purpose is Purpose.LORA and not _SAFETENSORS.match(head):
        raise NotWeights(f"{where} gave {_what(head)}, not a safetensors file. {_remedy(head)}")
    if purpose is Purpose.IMAGE:
        try:
            identify(head)
        except (ImageLoadError, UnsupportedImageFormat) as error:
            raise _at(where, error) from error


def _at(where: str, error: InputError) -> InputError:
    return type(error)(f"{where}: {error}", field=error.field)


def _what(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.startswith(_LFS):
        return "a Git LFS pointer"
    if head.startswith(_ZIP) or head[:1] == _PICKLE:
        return "a pickled checkpoint, which is never opened here"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "an HTML page"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return f"a file that begins with {head[:8].hex(' ')}"


def _remedy(head: bytes) -> str:
    if head.startswith(_ZIP) or head[:1] == _PICKLE:
        return "Convert it to safetensors first."
    return "Use the address of the file itself: on a hub the one with /resolve/, not /blob/."
