"""`data:` URIs (RFC 2397) to bytes, piece by piece. Pure; knows no network and no formats."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from kontextd_server.fetch.errors import InputTooLarge, InvalidDataUri

_HEAD_CHARACTERS = 1024  # media type and parameters; RFC 2397 gives no limit
_PIECE_CHARACTERS = 2**16
_SPACE = b"\t\n\f\r "


def decode(uri: str, max_bytes: int) -> tuple[Iterator[bytes], str]:
    """The bytes, in pieces of which some may be empty, and the stated media type ("" where none is).

    Raises `InvalidDataUri` and `InputTooLarge`, now or amid the pieces. As browsers do it (WHATWG Fetch, "data: URL
    processor"), base64 may be wrapped, percent-encoded and without padding.
    """
    uri = uri.lstrip()
    comma = uri.find(",", 0, _HEAD_CHARACTERS)
    if comma < 0:
        raise InvalidDataUri("the data URI has no comma. Its form is data:image/png;base64,AAAA.")
    head = uri[len("data:") : comma]
    media_type, _, last = head.rpartition(";")
    is_base64 = last.strip().lower() == "base64"
    if (len(uri) - comma - 1) * (3 if is_base64 else 4) // 4 > max_bytes * (1 if is_base64 else 3) + 3:
        raise _too_large(max_bytes)  # before anything is copied; percent-encoding takes up to three for one
    plain = unquoted(uri, comma + 1)
    data = _within(max_bytes, _from_base64(plain) if is_base64 else plain)
    return data, (media_type if is_base64 else head).strip()


def unquoted(text: str, start: int) -> Iterator[bytes]:
    """What `unquote_to_bytes` makes of the text from `start` on, which takes 180 times as much memory if done at once:
    it splits the text at each percent sign."""
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        cut = text.rfind("%", end - 2, end)  # so that no %XX is cut
        end = cut if cut >= 0 else end
        yield unquote_to_bytes(text[start:end].encode("utf-8", "surrogatepass"))  # any text is some bytes
        start = end


def _from_base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest, is_padded = b"", False  # fewer than four characters, which the next piece completes
    try:
        for piece in pieces:
            given = piece.translate(None, _SPACE)
            packed = given.rstrip(b"=")
            if b"=" in packed or (is_padded and packed):
                raise binascii.Error("Data after padding")
            is_padded = len(packed) < len(given) or is_padded
            packed = rest + packed
            whole = len(packed) // 4 * 4
            rest = packed[whole:]
            yield binascii.a2b_base64(packed[:whole], strict_mode=True)
        yield binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True)
    except binascii.Error as error:
        raise InvalidDataUri(f"the data URI is no valid base64: {error}. Encode the file again, whole.") from error


def _within(max_bytes: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    size_bytes = 0
    for piece in pieces:
        size_bytes += len(piece)
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        yield piece


def _too_large(max_bytes: int) -> InputTooLarge:
    return InputTooLarge(f"the data URI holds more than the {max_bytes} bytes allowed. Send a smaller file.")
