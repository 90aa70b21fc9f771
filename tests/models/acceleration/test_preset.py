"""A preset refuses what cannot be carried out, naming the value."""

from __future__ import annotations

import pytest
from kontextd_models.acceleration.preset import SHORTCUTS, Guard, Preset


def test_the_default_is_exact_and_claims_nothing_for_rows_made_from_it() -> None:
    assert Preset(computed=0.5).summary == ""
    assert Preset().is_exact
    assert SHORTCUTS.is_exact
    assert Preset(masks={3: "FFF"}).is_exact


@pytest.mark.parametrize(
    "preset", [Preset(computed=0.9), Preset(reuse_reference=True), Preset(masks={3: "FcF"}), Preset(masks={3: "F.F"})]
)
def test_what_leaves_something_out_is_not_exact(preset: Preset) -> None:
    assert not preset.is_exact


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"computed": 0.0}, "computed is 0.0"),
        ({"computed": 1.01}, "computed is 1.01"),
        ({"computed": float("nan")}, "computed is nan"),
        ({"prefix": 0}, "prefix is 0"),
        ({"refreshes": -1}, "refreshes is -1"),
        ({"forecast_order": 2}, "forecast_order is 2"),
        ({"masks": {0: ""}}, "for at least one step"),
        ({"masks": {4: "FFF"}}, "has 3"),
        ({"masks": {3: "F?F"}}, "holds ?"),
        ({"masks": {3: "cFF"}}, "first step must be F"),
        ({"masks": {3: "FF."}}, "last step must run"),
    ],
)
def test_a_value_out_of_its_range_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("?", r"\?").replace(".", r"\.")):
        Preset(**values)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(("residual", "extra_steps"), [(0.0, 1), (float("inf"), 1), (float("nan"), 1), (0.1, 0)])
def test_a_guard_that_never_or_always_acts_is_refused(residual: float, extra_steps: int) -> None:
    with pytest.raises(ValueError, match="guard"):
        Guard(residual, extra_steps)
