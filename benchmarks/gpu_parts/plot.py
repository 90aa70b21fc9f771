"""Horizontal bars as SVG. Knows text and rectangles; knows no results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_LABELS, _WIDTH, _ROW, _TOP = 300, 900, 26, 64  # pixels
_OURS, _OTHERS, _MARK = "#2f6fb2", "#a9a9a9", "#c0392b"


@dataclass(frozen=True)
class Bar:
    """`mark`: a value to compare with, on the same axis."""

    label: str
    value: float
    is_ours: bool
    mark: float | None = None


def bars_svg(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """A bar each, in the order given, from 0."""
    largest = max([*(bar.value for bar in bars), *(bar.mark or 0.0 for bar in bars)], default=0.0) or 1.0
    scale = (_WIDTH - _LABELS - 90) / largest
    height = _TOP + _ROW * len(bars) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="17">{escape(title)}</text>',
        f'<text x="16" y="46" font-size="12" fill="#555">{escape(unit)}</text>',
    ]
    for index, bar in enumerate(bars):
        parts += _bar(bar, _TOP + index * _ROW, scale)
    return "\n".join([*parts, "</svg>", ""])


def _bar(bar: Bar, top: int, scale: float) -> Iterator[str]:
    colour = _OURS if bar.is_ours else _OTHERS
    end = _LABELS + bar.value * scale
    yield f'<text x="{_LABELS - 8}" y="{top + 14}" font-size="13" text-anchor="end">{escape(bar.label)}</text>'
    yield f'<rect x="{_LABELS}" y="{top}" width="{bar.value * scale:.1f}" height="18" fill="{colour}"/>'
    yield f'<text x="{end + 6:.1f}" y="{top + 14}" font-size="12">{bar.value:.2f}</text>'
    if bar.mark is not None:
        at = _LABELS + bar.mark * scale
        yield f'<rect x="{at - 1:.1f}" y="{top - 3}" width="2" height="24" fill="{_MARK}"/>'
