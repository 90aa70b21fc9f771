"""The table of presets that a choice makes, as a file holds it. Knows the format of tables; writes no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kontextd_models.acceleration.preset import Preset
from kontextd_models.acceleration.table import row_as_json
from kontextd_models.records import Acceleration
from kontextd_models.trials.candidates import exact, summary_of
from kontextd_models.trials.choosing import Choice, Gates


def rows_of(choice: Choice, none: Preset, gates: Gates, steps: int) -> dict[Acceleration, Preset]:
    """`none` as it was; the others by their points, or exact where they have none: slower, and no less faithful."""
    rows = {Acceleration.NONE: none}
    for name, point in choice.points.items():
        if point is None:
            why = f"every step, every token: no row that was tried meets {gates[name]:g} dB"
            rows[name] = replace(exact(steps).row, summary=why)
        else:
            measured = "" if point.candidate.row.is_exact else f" (as measured at {steps} steps)"
            rows[name] = replace(point.candidate.row, summary=summary_of(point.candidate.row, steps) + measured)
    return rows


def table_of(about: str, precision: str, rows: Mapping[Acceleration, Preset]) -> dict[str, object]:
    """What `acceleration.table.read_table` reads."""
    return {
        "about": about,
        "precision": precision,
        "presets": {name.value: row_as_json(row) for name, row in rows.items()},
    }
