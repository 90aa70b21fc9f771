"""Byte ranges of a file (RFC 9110, section 14). Pure: numbers and the text of a `Range` field; knows no files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kontextd_server.files.errors import InvalidRange

_ONE_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Span:
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


def parse_range(text: str | None, size_bytes: int) -> Span | None:
    """The part of a file of `size_bytes` that a `Range` field asks for; None where the whole file is the answer.

    The whole file also answers what is malformed, another unit, and several ranges at once: the RFC lets a server
    ignore them. Raises `InvalidRange` where no byte asked for exists.
    """
    found = _ONE_RANGE.fullmatch(text or "")
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = max(0, size_bytes - int(found[2])), size_bytes  # the last n bytes
    else:
        start, stop = int(found[1]), min(size_bytes, int(found[2]) + 1) if found[2] else size_bytes
        if found[2] and int(found[2]) < start:
            return None  # malformed by the RFC: the last byte comes before the first
    if start >= size_bytes:
        raise InvalidRange(f"the range {text!r} begins after the last of {size_bytes} bytes. Ask for less.")
    return Span(start, stop)
