"""Spans of time as commands print and read them. Knows numbers and text only."""

from __future__ import annotations

import argparse
import math
import re

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(?P<number>\d{1,9}(\.\d{1,9})?) ?(?P<unit>s|min|h|d)")


def span_text(seconds: float) -> str:
    """In the largest unit of which there is one."""
    for unit in ("d", "h", "min"):
        if seconds >= _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def span(text: str) -> float:
    """Seconds, of an option such as `30d`; for argparse."""
    found = _SPAN.fullmatch(text)
    seconds = math.nan if found is None else float(found["number"]) * _UNITS[found["unit"]]
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time: use a number with s, min, h or d, as 30d.")
    return seconds
