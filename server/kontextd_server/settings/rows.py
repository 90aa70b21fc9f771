"""One setting: how the text of its variable becomes its value, and what it is for. Knows no setting in particular."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

MIB = 2**20
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
_T = TypeVar("_T")
_ROW = "row"


@dataclass(frozen=True)
class Row:
    """`parse` raises `ValueError` with the remedy. A value that `is_secret` is shown in no message."""

    parse: Callable[[str], object]
    doc: str
    is_secret: bool = False


def setting(default: _T, parse: Callable[[str], object], doc: str, *, is_secret: bool = False) -> _T:
    """A field of a record of settings."""
    made: Any = field(default=default, metadata={_ROW: Row(parse, doc, is_secret)})
    return cast(_T, made)  # what a type checker is to see


def rows(kind: type) -> dict[str, Row]:
    """The rows of a record's fields, by name."""
    return {one.name: one.metadata[_ROW] for one in fields(kind)}


def flag(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError("use 1 or 0")


def count(text: str) -> int:
    """0 and above."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    raise ValueError("use a whole number, 0 or above")


def positive(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0:
        return int(text)
    raise ValueError("use a whole number above 0")


def area(text: str) -> int:
    try:
        return positive(text)
    except ValueError as error:
        raise ValueError("use a number of pixels above 0, for example 1048576") from error


def port(text: str) -> int:
    if (number := count(text)) < 2**16:
        return number
    raise ValueError("use a port from 1 to 65535, or 0 for any that is free")


def probability(text: str) -> float:
    if 0 <= (value := _number(text)) <= 1:  # NaN fails too
        return value
    raise ValueError("use a number from 0 to 1")


def seconds(text: str) -> float:
    if 0 < (value := _number(text)) < math.inf:  # NaN fails too
        return value
    raise ValueError("use a number of seconds above 0")


def rate(text: str) -> float:
    if 0 < (value := _number(text)) < math.inf:
        return value
    raise ValueError("use a number above 0")


def one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        raise ValueError(f"use one of {', '.join(names)}")

    return parse


def names(text: str) -> tuple[str, ...]:
    """Comma-separated."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def path(text: str) -> Path:
    return Path(text).expanduser()


def checked(parse: Callable[[str], object], check: Callable[[Any], object]) -> Callable[[str], object]:
    """A value that whoever uses it takes. `check` raises `ValueError`, naming what is wrong and the remedy."""

    def parse_checked(text: str) -> object:
        value = parse(text)
        check(value)
        return value

    return parse_checked


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
