"""Which of the points make the presets. Pure functions over figures; know no engine and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kontextd_models.records import Acceleration
from kontextd_models.trials.sweeping import Point

Gates = Mapping[Acceleration, float]  # dB of PSNR to `none`, of each preset but it


@dataclass(frozen=True)
class Choice:
    """A point for each preset, at one precision; None where nothing meets the gate, so that the preset stays exact."""

    precision: str
    points: Mapping[Acceleration, Point | None]


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, fastest first: no other point is as fast and as faithful, and better in one."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.ratio, -point.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best


def fastest(points: Sequence[Point], gate_db: float) -> Point | None:
    """The fastest that meets the gate and is faster than `none`; of two as fast the more faithful one."""
    fit = [point for point in points if point.psnr >= gate_db and point.ratio < 1]
    return min(fit, key=lambda point: (point.ratio, -point.psnr), default=None)


def choose(points: Sequence[Point], gates: Gates, first: str) -> Choice:
    """At each precision the fastest row by preset; then the precision whose presets together take the least time.

    `first` is the precision of the pictures that all are held against. Another one is taken only where it has a row
    for every preset: there is no exact row to fall back on.
    """
    choices = [
        Choice(precision, {name: fastest(_of(points, precision), gate) for name, gate in gates.items()})
        for precision in dict.fromkeys([first, *(point.precision for point in points)])
    ]
    fit = [choice for choice in choices if choice.precision == first or all(choice.points.values())]
    return min(fit, key=lambda choice: sum(point.ratio if point else 1.0 for point in choice.points.values()))


def _of(points: Sequence[Point], precision: str) -> list[Point]:
    return [point for point in points if point.precision == precision]
