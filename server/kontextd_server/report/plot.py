"""Time against fidelity as an SVG. Knows points, axes and colours; knows no presets but by the name of their colour.

Left is faster, up is more faithful; what equals `none` to the bit has a line of its own at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 1180, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 20, 56
_EXACT = 34  # px under the top: where the line of equal pictures is
_STEPS = (1, 2, 5, 10, 20)
_LARGE, _SMALL = 7.0, 4.0
_LETTER = 8.2  # px, of a label: rather too wide


@dataclass(frozen=True)
class Mark:
    """A point: time in percent of that of `none`, PSNR to it in dB. `kind` is none, regular, high, dot or on-front."""

    percent: float
    psnr: float
    kind: str
    note: str  # shown where a pointer rests on it
    label: str = ""
    is_faint: bool = False


@dataclass(frozen=True)
class Gate:
    """The least fidelity that a preset is to have."""

    psnr: float
    kind: str
    label: str


class _Axes:
    """From percent and dB to pixels."""

    def __init__(self, marks: Sequence[Mark], gates: Sequence[Gate]) -> None:
        levels = [mark.psnr for mark in marks if math.isfinite(mark.psnr)] + [gate.psnr for gate in gates]
        low, high = min(levels, default=20.0), max(levels, default=40.0)
        self.step = next((step for step in _STEPS if (high - low) / step <= 8), 50)
        self.low = math.floor((low - 0.5) / self.step) * self.step
        self.high = math.ceil((high + 0.5) / self.step) * self.step
        self.end = max(110, math.ceil(max((mark.percent for mark in marks), default=100) / 10) * 10 + 10)

    def x(self, percent: float) -> float:
        return _LEFT + percent / self.end * (_WIDTH - _LEFT - _RIGHT)

    def y(self, psnr: float) -> float:
        if math.isinf(psnr):
            return _TOP + _EXACT / 2
        share = (psnr - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP - _EXACT)


def plot(marks: Sequence[Mark], front: Sequence[Mark] = (), gates: Sequence[Gate] = ()) -> str:
    """`front` are the points that a line leads through, the fastest first."""
    axes = _Axes(marks, gates)
    parts = (*_grid(axes), *_gates(axes, gates), *_front(axes, front), *_marks(axes, marks))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Time against fidelity to none, '
        f'{len(marks)} points">\n{"".join(parts)}</svg>\n'
    )


def _grid(axes: _Axes) -> Iterator[str]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for level in range(axes.low, axes.high + 1, axes.step):
        y = axes.y(level)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>\n'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{level}</text>\n'
    top = axes.y(math.inf)
    yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{top:.1f}" y2="{top:.1f}"/>\n'
    yield f'<text class="tick" x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">equal</text>\n'
    for percent in range(0, axes.end + 1, 10 if axes.end <= 150 else 50):
        x = axes.x(percent)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>\n'
        yield f'<text class="tick" x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{percent}</text>\n'
    middle = (_LEFT + right) / 2
    yield f'<text class="axis" x="{middle:.1f}" y="{_HEIGHT - 12}" text-anchor="middle">'
    yield "denoising time, % of that of none (left is faster)</text>\n"
    yield f'<text class="axis" transform="translate(16 {(_TOP + floor) / 2:.1f}) rotate(-90)" text-anchor="middle">'
    yield "PSNR to none, dB (up is more faithful)</text>\n"


def _gates(axes: _Axes, gates: Sequence[Gate]) -> Iterator[str]:
    for gate in gates:
        y = axes.y(gate.psnr)
        yield f'<line class="gate stroke-{gate.kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>\n'
        yield f'<text class="label fill-{gate.kind}" x="{_WIDTH - _RIGHT}" y="{y - 6:.1f}" text-anchor="end">'
        yield f"{escape(gate.label)}</text>\n"


def _front(axes: _Axes, front: Sequence[Mark]) -> Iterator[str]:
    if len(front) > 1:
        points = " ".join(f"{axes.x(mark.percent):.1f},{axes.y(mark.psnr):.1f}" for mark in front)
        yield f'<polyline class="front" points="{points}"/>\n'


def _marks(axes: _Axes, marks: Sequence[Mark]) -> Iterator[str]:
    """The large ones last, so that none of them is covered."""
    labels = _Labels([(axes.x(mark.percent), axes.y(mark.psnr)) for mark in marks if mark.label])
    for mark in sorted(marks, key=lambda mark: bool(mark.label)):
        x, y = axes.x(mark.percent), axes.y(mark.psnr)
        name = mark.kind if mark.kind in ("dot", "on-front") else f"fill-{mark.kind}"
        faint = " faint" if mark.is_faint else ""
        radius = _LARGE if mark.label else _SMALL
        yield f'<circle class="{name}{faint}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">'
        yield f"<title>{escape(mark.note)}</title></circle>\n"
        if mark.label:
            left, floor = labels.place(x, y, mark.label)
            yield f'<text class="label {name}" x="{left:.1f}" y="{floor:.1f}">{escape(mark.label)}</text>\n'


class _Labels:
    """Finds a place beside its mark for each label, clear of the other labels and of the large marks."""

    def __init__(self, marks: Sequence[tuple[float, float]]) -> None:
        self._taken = [(x - _LARGE, y - _LARGE, x + _LARGE, y + _LARGE) for x, y in marks]

    def place(self, x: float, y: float, text: str) -> tuple[float, float]:
        """The left end of the line the text stands on."""
        width = _LETTER * len(text)
        sides = (x + 11, x - 11 - width)
        places = [(left, y + rise) for rise in (-8, 18, 5, -24, 34) for left in sides]
        left, floor = next((place for place in places if self._is_free(place, width)), places[0])
        self._taken.append(_box(left, floor, width))
        return left, floor

    def _is_free(self, place: tuple[float, float], width: float) -> bool:
        left, top, right, floor = _box(*place, width)
        inside = left >= _LEFT and right <= _WIDTH and top >= 0 and floor <= _HEIGHT - _BOTTOM
        return inside and all(
            right < other_left or left > other_right or floor < other_top or top > other_floor
            for other_left, other_top, other_right, other_floor in self._taken
        )


def _box(left: float, floor: float, width: float) -> tuple[float, float, float, float]:
    return left, floor - 11, left + width, floor + 3
