"""What came of a calibration, for machines and for a terminal. Chooses nothing, writes no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kontextd_models import Acceleration

from kontextd_server.report.figures import aligned, counted, db_json, db_text

if TYPE_CHECKING:
    from kontextd_models.trials.choosing import Choice, Gates
    from kontextd_models.trials.sweeping import Point, Sweep


@dataclass(frozen=True)
class Outcome:
    """A sweep as far as it came. `chosen` is None where it was broken off, and a point None where nothing fits."""

    points: Sequence[Point]
    front: Sequence[Point]
    gates: Gates
    chosen: Mapping[Acceleration, Point | None] | None
    notes: Sequence[str]  # what was left out and why, what follows from the choice, what the engine said

    @classmethod
    def of(cls, sweep: Sweep, gates: Gates, choice: Choice | None, said: Sequence[str]) -> Outcome:
        from kontextd_models.trials.choosing import front

        chosen = choice.points if choice else None
        notes = [*_unmet(gates, chosen or {}), *_timed_once(chosen or {}), *_left_out(sweep), *said]
        return cls(sweep.points, front(sweep.points), gates, chosen, notes)

    def as_json(self) -> dict[str, object]:
        chosen = {name.value: point and self._point(point) for name, point in (self.chosen or {}).items()}
        return {
            "gates_db": {name.value: gate for name, gate in self.gates.items()},
            "chosen": None if self.chosen is None else chosen,
            "notes": list(self.notes),
            "points": [self._point(point) for point in self.points],
        }

    def as_text(self) -> str:
        """The presets, and the notes."""
        head = ("preset", "row", "time", "PSNR", "worst", "gate")
        rows = [
            (
                name.value,
                point.candidate.name if point else "every step, every token",
                f"{100 * point.ratio:.1f} %" if point else "100 %",
                f"{db_text(point.psnr)} dB" if point else "exact",
                db_text(point.worst_picture_psnr) if point else "exact",
                f"{self.gates[name]:g} dB",
            )
            for name, point in (self.chosen or {}).items()
        ]
        return "\n".join([aligned(head, rows, texts=2), *self.notes])

    def in_a_sentence(self) -> str:
        """For the table of presets."""
        return "; ".join(
            f"{name.value} {point.psnr:.1f} dB (gate {self.gates[name]:g}) in {100 * point.ratio:.0f} % of none's time"
            if point
            else f"{name.value} exact (nothing tried meets {self.gates[name]:g} dB)"
            for name, point in (self.chosen or {}).items()
        )

    def _point(self, point: Point) -> dict[str, object]:
        from kontextd_models.acceleration.table import row_as_json

        return {
            "name": point.candidate.name,
            "precision": point.precision,
            "mask": point.candidate.mask,
            "row": row_as_json(point.candidate.row),
            "denoise_ratio": round(point.ratio, 4),
            "turns": point.turns,
            "denoise_s": round(point.denoise_s, 4),
            "psnr": db_json(point.psnr),
            "psnr_by_loras": {name: db_json(value) for name, value in point.mean_psnr.items()},
            "worst_picture_psnr": db_json(point.worst_picture_psnr),
            "worst_picture": point.worst_picture,
            "on_front": point in self.front,
        }


def _unmet(gates: Gates, chosen: Mapping[Acceleration, Point | None]) -> Iterator[str]:
    for name, point in chosen.items():
        if point is None:
            yield f"No row that was tried meets {gates[name]:g} dB, so {name.value} runs every step and token."


def _timed_once(chosen: Mapping[Acceleration, Point | None]) -> Iterator[str]:
    names = [name.value for name, point in chosen.items() if point is not None and not point.turns]
    if names:
        yield (
            f"The rows of {' and '.join(names)} were not timed again in turns with none, for want of time or memory: "
            "their seconds stand beside those of none at the start."
        )


def _left_out(sweep: Sweep) -> Iterator[str]:
    if sweep.left_out:
        yield (
            f"The budget has room for {counted(len(sweep.cases), 'edit')} by each row. Combinations of photo, prompt "
            f"and LoRAs that were left out, evenly: {sweep.left_out}."
        )
    if sweep.not_reached:
        yield f"Not tried, for want of time: {counted(len(sweep.not_reached), 'row')}."
    if sweep.too_large:
        yield f"Left out, for want of the device's memory: {counted(len(sweep.too_large), 'row')}."
