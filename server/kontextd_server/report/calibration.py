"""The page of `kontextd calibrate`: the Pareto front, what was tried, what was chosen. Chooses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kontextd_server.report.figures import db_text
from kontextd_server.report.html import Column, facts, page, paragraph, section, table
from kontextd_server.report.plot import Gate, Mark, plot

if TYPE_CHECKING:
    from kontextd_models.trials.sweeping import Point

    from kontextd_server.report.outcome import Outcome


def calibration_page(subject: Mapping[str, str], outcome: Outcome) -> str:
    """The whole document. `subject` says what was measured, on what, and how."""
    ended = "" if outcome.chosen is not None else " It was broken off before its end: no preset file was written."
    return page(
        "Calibration of the presets",
        f"{subject['model']}: rows tried with kontextd calibrate, and those that make regular and high.{ended}",
        [
            section("Time and fidelity", _plot(outcome), paragraph(_legend(outcome), "note")),
            section("Presets", _chosen(outcome), *(paragraph(note, "warning") for note in outcome.notes)),
            section("All rows that were tried", _tried(outcome), paragraph(_MASKS, "note")),
            section("What was measured", facts(subject)),
        ],
    )


_MASKS = (
    "Of the mask: F every token, c text and output tokens against keys and values kept of the reference, a dot is "
    "skipped and forecast. Time is the median, over all edits, of the seconds of denoising to those of none at the "
    "start; with a number of turns, over so many edits, each beside one by none. PSNR is to the picture of none: the "
    "mean over photos and prompts (each counted as 60 dB at most), the lowest over the sets of LoRAs."
)


def _legend(outcome: Outcome) -> str:
    return (
        f"{len(outcome.points)} rows. The line leads through the Pareto front: rows of which no other is as fast and "
        "as faithful. Dashed: the fidelity that each preset is to have."
    )


def _plot(outcome: Outcome) -> str:
    chosen: dict[int, list[str]] = {}
    for name, point in (outcome.chosen or {}).items():
        if point is not None:
            chosen.setdefault(id(point), []).append(name.value)
    on_front = {id(point) for point in outcome.front}
    marks = []
    for point in outcome.points:
        names = chosen.get(id(point), [])
        kind = names[0] if names else "on-front" if id(point) in on_front else "dot"
        note = f"{row_text(point)}: {100 * point.ratio:.0f} %, {db_text(point.psnr)} dB"
        marks.append(Mark(100 * point.ratio, point.psnr, kind, note, " and ".join(names)))
    line = [Mark(100 * point.ratio, point.psnr, "on-front", "") for point in outcome.front]
    gates = [Gate(gate, name.value, f"gate of {name.value}, {gate:g} dB") for name, gate in outcome.gates.items()]
    return plot(marks, line, gates)


def _chosen(outcome: Outcome) -> str:
    columns = [
        Column("preset"),
        Column("gate, dB", "number"),
        Column("row"),
        Column("mask", "code"),
        *(Column(name, "number") for name in ("time, % of none", "PSNR, dB", "worst picture, dB")),
    ]
    rows = []
    for name, gate in outcome.gates.items():
        point = outcome.chosen.get(name) if outcome.chosen else None
        rest = ["none: broken off" if outcome.chosen is None else "exact: nothing tried meets the gate", "", "", "", ""]
        rows.append([name.value, f"{gate:g}", *(_cells(point) if point else rest)])
    return table(columns, rows)


def _tried(outcome: Outcome) -> str:
    columns = [
        Column("row"),
        Column("mask", "code"),
        *(Column(name, "number") for name in ("time, % of none", "PSNR, dB", "worst picture, dB")),
        Column("of"),
        Column("turns", "number"),
    ]
    points = sorted(outcome.points, key=lambda point: point.ratio)
    chosen = {id(point) for point in (outcome.chosen or {}).values() if point is not None}
    strong = [number for number, point in enumerate(points) if id(point) in chosen]
    return table(columns, [_tried_cells(point) for point in points], strong)


def _tried_cells(point: Point) -> list[str]:
    return [*_cells(point), point.worst_picture, str(point.turns or "")]


def _cells(point: Point) -> list[str]:
    return [
        row_text(point),
        point.candidate.mask,
        f"{100 * point.ratio:.1f}",
        db_text(point.psnr),
        db_text(point.worst_picture_psnr),
    ]


def row_text(point: Point) -> str:
    """Full precision goes without saying."""
    return point.candidate.name if point.precision == "full" else f"{point.candidate.name}, {point.precision}"
