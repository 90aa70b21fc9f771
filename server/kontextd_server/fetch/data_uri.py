"""`data:` URIs (RFC 2397) to bytes. Pure; knows no network and no formats."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from kontextd_server.fetch.errors import InputTooLarge, InvalidDataUri

_HEAD_CHARACTERS = 1024  # media type and parameters; RFC 2397 gives no limit
_SPACE = re.compile(rb"[\t\n\f\r ]+")


def decode(uri: str, max_bytes: int) -> tuple[bytes, str]:
    """The bytes and the stated media type ("" where none is). Raises `InvalidDataUri` and `InputTooLarge`.

    As browsers do it (WHATWG Fetch, "data: URL processor"), base64 may be wrapped, percent-encoded and without padding.
    """
    head, comma, body = _split(uri)
    if not comma:
        raise InvalidDataUri("the data URI has no comma. Its form is data:image/png;base64,AAAA.")
    media_type, _, last = head.rpartition(";")
    is_base64 = last.strip().lower() == "base64"
    if len(body) * (3 if is_base64 else 4) // 4 > max_bytes * (1 if is_base64 else 3) + 3:
        raise _too_large(max_bytes)  # before anything is copied; percent-encoding takes up to three for one
    data = _from_base64(body) if is_base64 else unquote_to_bytes(body)
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data, (media_type if is_base64 else head).strip()


def _split(uri: str) -> tuple[str, str, str]:
    begun = uri.lstrip()
    at = begun.find(",", 0, _HEAD_CHARACTERS)
    return (begun[len("data:") : at], ",", begun[at + 1 :]) if at >= 0 else (begun[:0], "", "")


def _from_base64(body: str) -> bytes:
    try:
        packed = _SPACE.sub(b"", unquote_to_bytes(body) if "%" in body else body.encode("ascii"))
        return base64.b64decode(packed.rstrip(b"=") + b"=" * (-len(packed.rstrip(b"=")) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise InvalidDataUri(f"the data URI is no valid base64: {error}. Encode the file again, whole.") from error


def _too_large(max_bytes: int) -> InputTooLarge:
    return InputTooLarge(f"the data URI holds more than the {max_bytes} bytes allowed. Send a smaller file.")
