"""Figures as text: decibels, sizes, and tables for a terminal. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def db_text(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def db_json(value: float) -> float | None:
    """JSON has no infinity: null is an equal picture."""
    return None if math.isinf(value) else round(value, 2)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table for a terminal; the first `texts` columns lean left, the numbers after them right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
