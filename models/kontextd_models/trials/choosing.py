"""Which of the points make the presets. Pure functions over figures; know no engine and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kontextd_models.records import Acceleration
from kontextd_models.trials.sweeping import Point

Gates = Mapping[Acceleration, float]  # dB of PSNR to `none`, of each preset but it

_MOST = 4  # finalists for each gate
_NEAR = 1.25  # times the ratio of the fastest


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


def finalists(points: Sequence[Point], gates: Gates) -> list[Point]:
    """Those whose seconds decide: of each gate the few fastest that meet it and are near the fastest of them."""
    found: dict[int, Point] = {}
    for gate_db in gates.values():
        fit = sorted((point for point in points if point.psnr >= gate_db), key=lambda point: point.ratio)
        found |= {id(point): point for point in fit[:_MOST] if point.ratio <= fit[0].ratio * _NEAR}
    return list(found.values())


def fastest(points: Sequence[Point], gate_db: float) -> Point | None:
    """The fastest that meets the gate and is faster than `none`; of two as fast the more faithful one.

    Where some were timed again, in turns with `none`, it is one of them.
    """
    fit = [point for point in points if point.psnr >= gate_db]
    decided = [point for point in fit if point.turns] or fit
    return min(
        (point for point in decided if point.ratio < 1), key=lambda point: (point.ratio, -point.psnr), default=None
    )


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
