"""The presets of a model, read from JSON. Knows files and how many steps a request may ask for; knows no torch.

A table is the file `presets.json` of a model's folder, one that the operator names (as `kontextd calibrate` writes it),
or the one for FLUX.1 Kontext that ships beside this module:

    {"about": "where the rows come from", "precision": "fp8", "presets": {"regular": {"computed": 0.68, …}, …}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kontextd_models.acceleration.preset import Guard, Preset
from kontextd_models.errors import ModelError
from kontextd_models.folder import read_json
from kontextd_models.records import Acceleration
from kontextd_models.request import MAX_STEPS

PRESETS_FILE = "presets.json"
SHIPPED = Path(__file__).with_name("kontext.json")
_KEYS = {"about", "precision", "presets"}
_PRECISIONS = ("", "full", "fp8")  # "": any
_STEPS = {str(steps): steps for steps in range(1, MAX_STEPS + 1)}
_MOST_SHOWN = 40  # characters of a value that no row could have
_TYPES: Mapping[str, type] = {
    "summary": str,
    "computed": float,
    "prefix": int,
    "reuse_reference": bool,
    "refreshes": int,
    "forecast_order": int,
    "modulation_ahead": bool,
    "trim_last_block": bool,
}


@dataclass(frozen=True)
class PresetTable:
    """A row for each preset; `precision` is the one the rows were settled with, empty where any will do."""

    rows: Mapping[Acceleration, Preset]
    file: Path
    about: str = ""
    precision: str = ""


def presets_of(folder: Path, named: Path | None = None) -> PresetTable:
    """The operator's table, else the model's own, else the shipped one. Raises `ModelError` naming file and value."""
    if named is not None and not named.is_file():
        raise ModelError(
            f"{named} is missing. Name a table of presets that is there, as `kontextd calibrate` writes it."
        )
    own = folder / PRESETS_FILE
    return read_table(named or (own if own.exists() else SHIPPED))


def read_table(file: Path) -> PresetTable:
    """Raises `ModelError` for a missing row, an unknown key, a value out of range, or a `none` that is not exact."""
    data = read_json(file)
    if unknown := sorted(data.keys() - _KEYS):
        raise ModelError(f"{file}: unknown key {', '.join(unknown)}; the keys are {', '.join(sorted(_KEYS))}.")
    about, precision, presets = data.get("about", ""), data.get("precision", ""), data.get("presets")
    if not isinstance(about, str):
        raise ModelError(f"{file}: about is {about!r}; it must be a text.")
    if precision not in _PRECISIONS:
        raise ModelError(f"{file}: precision is {precision!r}; it must be full or fp8, or left out.")
    names = [name.value for name in Acceleration]
    if not isinstance(presets, dict) or set(presets) != set(names):
        raise ModelError(f"{file}: presets must be an object with a row for each of {', '.join(names)}, and no other.")
    rows = {Acceleration(name): _row(file, name, row) for name, row in presets.items()}
    if not rows[Acceleration.NONE].is_exact:
        raise ModelError(f"{file}: none leaves something out; it must run every step in full. Change another preset.")
    return PresetTable(rows, file, about, str(precision))


def row_as_json(preset: Preset) -> dict[str, object]:
    """The row as a table holds it; what has its default is left out."""
    row: dict[str, object] = {
        name: getattr(preset, name) for name in _TYPES if getattr(preset, name) != getattr(_EXACT, name)
    }
    if preset.guard is not None:
        row["guard"] = {"residual": preset.guard.residual, "extra_steps": preset.guard.extra_steps}
    if preset.masks:
        row["masks"] = {str(steps): mask for steps, mask in sorted(preset.masks.items())}
    return row


_EXACT = Preset()


def _row(file: Path, name: str, row: object) -> Preset:
    where = f"{file}: {name}"
    if not isinstance(row, dict):
        raise ModelError(f"{where} is {row!r}; it must be an object.")
    known = {field.name for field in fields(Preset)}
    if unknown := sorted(row.keys() - known):
        raise ModelError(f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(sorted(known))}.")
    # Any: each value is checked to be of its field's type.
    values: dict[str, Any] = {key: _value(where, key, row[key], kind) for key, kind in _TYPES.items() if key in row}
    try:
        return Preset(**values, guard=_guard(where, row.get("guard")), masks=_masks(where, row.get("masks", {})))
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error


def _value(where: str, key: str, value: object, kind: type) -> object:
    if kind is float and type(value) is int:
        return _float(f"{where}: {key}", value, "it must be above 0 and at most 1")
    if type(value) is not kind:
        raise ModelError(f"{where}: {key} is {value!r}; it must be of the type {kind.__name__}.")
    return value


def _guard(where: str, guard: object) -> Guard | None:
    if guard is None:
        return None
    if not isinstance(guard, dict) or set(guard) != {"residual", "extra_steps"}:
        raise ModelError(f"{where}: guard is {guard!r}; it must hold residual and extra_steps.")
    residual, extra_steps = guard["residual"], guard["extra_steps"]
    if type(residual) not in (int, float) or type(extra_steps) is not int:
        raise ModelError(f"{where}: guard is {guard!r}; residual must be a number, extra_steps a whole one.")
    return Guard(_float(f"{where}: guard: residual", residual, "it must be a finite number above 0"), extra_steps)


def _float(where: str, value: float, remedy: str) -> float:
    try:
        return float(value)
    except OverflowError as error:  # JSON's whole numbers have no end
        raise ModelError(f"{where} is {_shown(value)}; {remedy}.") from error


def _masks(where: str, masks: object) -> Mapping[int, str]:
    if not isinstance(masks, dict) or not all(isinstance(mask, str) for mask in masks.values()):
        raise ModelError(f'{where}: masks is {masks!r}; it must give a text for numbers of steps, such as "28".')
    for steps in (key for key in masks if key not in _STEPS):
        raise ModelError(
            f"{where}: masks has {_shown(steps)} for a number of steps; it must be a whole one from 1 to {MAX_STEPS}, "
            'such as "28".'
        )
    return {_STEPS[steps]: mask for steps, mask in masks.items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}… ({len(text)} characters)"
