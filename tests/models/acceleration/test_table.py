"""Tables of presets, read from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kontextd_models.acceleration.preset import Guard, Preset
from kontextd_models.acceleration.table import SHIPPED, presets_of, read_table, row_as_json
from kontextd_models.errors import ModelError
from kontextd_models.records import Acceleration
from kontextd_models.request import MAX_STEPS

ROWS: dict[str, object] = {"none": {}, "regular": {"computed": 0.5}, "high": {"computed": 0.25}}


def table(folder: Path, data: object, name: str = "presets.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(data))
    return file


def test_the_named_table_goes_before_the_models_own_and_that_before_the_shipped_one(tmp_path: Path) -> None:
    assert presets_of(tmp_path).file == SHIPPED
    own = table(tmp_path, {"presets": ROWS})
    assert presets_of(tmp_path).file == own
    named = table(tmp_path, {"presets": ROWS}, "named.json")
    assert presets_of(tmp_path, named).file == named


def test_the_embedded_model_has_a_table_of_its_own(embedded_folder: Path) -> None:
    assert presets_of(embedded_folder).file == embedded_folder / "presets.json"


@pytest.mark.parametrize("file", ["shipped", "embedded"])
def test_none_is_exact_wherever_it_comes_from(file: str, embedded_folder: Path) -> None:
    rows = read_table(SHIPPED if file == "shipped" else embedded_folder / "presets.json").rows
    assert rows[Acceleration.NONE] == Preset(summary=rows[Acceleration.NONE].summary)
    assert not rows[Acceleration.REGULAR].is_exact
    assert not rows[Acceleration.HIGH].is_exact


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    row = Preset(
        summary="as calibrated",
        computed=0.6,
        prefix=4,
        reuse_reference=True,
        refreshes=1,
        forecast_order=0,
        modulation_ahead=True,
        guard=Guard(0.25, 2),
        masks={5: "FFc.F", 4: "FFFF"},
    )
    presets = {"none": row_as_json(Preset()), "regular": row_as_json(row), "high": {}}
    read = read_table(table(tmp_path, {"about": "a test", "precision": "fp8", "presets": presets}))
    assert presets["none"] == {}
    assert read.rows[Acceleration.REGULAR] == row
    assert (read.about, read.precision) == ("a test", "fp8")


def test_masks_may_be_there_for_every_number_of_steps_that_a_request_may_ask_for(tmp_path: Path) -> None:
    masks = {str(steps): "F" * steps for steps in range(1, MAX_STEPS + 1)}
    read = read_table(table(tmp_path, {"presets": {**ROWS, "high": {"masks": masks}}}))
    assert read.rows[Acceleration.HIGH].masks == {int(steps): mask for steps, mask in masks.items()}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"presets": ROWS, "rows": 1}, "unknown key rows"),
        ({"presets": {"none": {}}}, "none, regular, high"),
        ({"presets": {**ROWS, "ultra": {}}}, "and no other"),
        ({"presets": ROWS, "about": 3}, "about is 3"),
        ({"presets": ROWS, "precision": "fp4"}, "precision is 'fp4'"),
        ({"presets": ROWS, "precision": ["fp8"]}, r"precision is \['fp8'\]"),
        ({"presets": {**ROWS, "none": {"computed": 0.9}}}, "none leaves something out"),
        ({"presets": {**ROWS, "none": {"masks": {"2": "Fc"}}}}, "none leaves something out"),
        ({"presets": {**ROWS, "high": []}}, r"high is \[\]"),
        ({"presets": {**ROWS, "high": {"speed": 2}}}, "high: unknown key speed"),
        ({"presets": {**ROWS, "high": {"computed": "half"}}}, "high: computed is 'half'"),
        ({"presets": {**ROWS, "high": {"prefix": True}}}, "high: prefix is True"),
        ({"presets": {**ROWS, "high": {"computed": 2}}}, "high: computed is 2.0"),
        ({"presets": {**ROWS, "high": {"guard": {"residual": 1}}}}, "high: guard"),
        ({"presets": {**ROWS, "high": {"guard": {"residual": "1", "extra_steps": 1}}}}, "high: guard"),
        ({"presets": {**ROWS, "high": {"guard": {"residual": 1, "extra_steps": 0}}}}, "extra_steps is 0"),
        ({"presets": {**ROWS, "high": {"masks": {"x": "F"}}}}, "high: masks"),
        ({"presets": {**ROWS, "high": {"masks": {"2": "F."}}}}, "last step must run"),
        ({"presets": {**ROWS, "high": {"masks": {"2": 1}}}}, "high: masks is .*; it must give a text"),
        ({"presets": {**ROWS, "high": {"masks": {"0": ""}}}}, "high: masks has '0' .* from 1 to 50, such as \"28\""),
        ({"presets": {**ROWS, "high": {"masks": {"51": "F" * 51}}}}, "high: masks has '51' for a number of steps"),
        ({"presets": {**ROWS, "high": {"masks": {"07": "F" * 7}}}}, "high: masks has '07' for a number of steps"),
        ({"presets": {**ROWS, "high": {"masks": {"9" * 5000: "F"}}}}, r"high: masks has '9{39}… \(5002 characters\)"),
        ({"presets": {**ROWS, "high": {"computed": 10**400}}}, r"high: computed is 10{39}… .*; it must be above 0"),
        (
            {"presets": {**ROWS, "high": {"guard": {"residual": 10**400, "extra_steps": 1}}}},
            r"high: guard: residual is 10{39}… \(401 characters\); it must be a finite number above 0",
        ),
        ([], "not a JSON object"),
    ],
)
def test_a_fault_is_named_with_its_file(tmp_path: Path, data: object, named: str) -> None:
    file = table(tmp_path, data)
    with pytest.raises(ModelError, match=named) as caught:
        read_table(file)
    assert str(file) in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.json is missing. Name a table"):
        presets_of(tmp_path, tmp_path / "absent.json")
