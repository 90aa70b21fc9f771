"""From a row to the steps of a request, for every number of steps a request may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models.acceleration.planning import Plan, plan
from kontextd_models.acceleration.preset import Guard, Preset, StepKind
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.records import Acceleration
from kontextd_models.request import MAX_STEPS

ROWS = st.builds(
    Preset,
    computed=st.floats(0.01, 1),
    prefix=st.integers(1, 8),
    reuse_reference=st.booleans(),
    refreshes=st.integers(0, 5),
)
STEPS = st.integers(1, MAX_STEPS)


def mask(preset: Preset, steps: int) -> str:
    return "".join(plan(preset, steps).kinds)


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_the_exact_row_runs_every_step_in_full(steps: int) -> None:
    assert mask(Preset(), steps) == "F" * steps


@given(ROWS, STEPS)
def test_every_row_fits_every_number_of_steps(preset: Preset, steps: int) -> None:
    kinds = mask(preset, steps)
    assert len(kinds) == steps
    prefix = min(preset.prefix, steps)
    assert kinds[:prefix] == "F" * prefix
    assert kinds[-1] != StepKind.SKIPPED
    computed = steps - kinds.count(StepKind.SKIPPED)
    assert computed == max(int(preset.computed * steps + 0.5), min(prefix + 1, steps))
    assert (StepKind.CACHED in kinds) <= preset.reuse_reference
    Preset(masks={steps: kinds})  # and it is a mask that a table may hold


@given(ROWS, STEPS)
def test_no_gap_is_longer_than_the_others_by_more_than_one(preset: Preset, steps: int) -> None:
    gaps = mask(preset, steps)[min(preset.prefix, steps) :].replace("c", "F").split("F")[:-1]
    assert max(map(len, gaps), default=0) - min(map(len, gaps), default=0) <= 1


@given(ROWS, STEPS)
def test_so_many_steps_after_the_prefix_refresh_what_is_kept(preset: Preset, steps: int) -> None:
    late = mask(preset, steps)[min(preset.prefix, steps) :].replace(".", "")
    expected = min(preset.refreshes, len(late)) if preset.reuse_reference else len(late)
    assert late.count("F") == expected


@given(ROWS, STEPS)
def test_without_kept_keys_the_same_steps_run_in_full(preset: Preset, steps: int) -> None:
    assert "".join(plan(preset, steps, keeps_reference=False).kinds) == mask(preset, steps).replace("c", "F")


def test_the_rows_for_kontext_compute_what_their_summaries_say() -> None:
    rows = read_table(SHIPPED).rows
    regular, high = mask(rows[Acceleration.REGULAR], 28), mask(rows[Acceleration.HIGH], 28)
    assert (regular.count("F"), regular.count("c"), regular.count(".")) == (5, 14, 9)
    assert (high.count("F"), high.count("c"), high.count(".")) == (3, 8, 17)
    assert plan(rows[Acceleration.NONE], 28).kinds == (StepKind.FULL,) * 28


def test_a_mask_of_the_row_goes_before_the_rule() -> None:
    preset = Preset(computed=0.5, prefix=1, masks={5: "FFc.F"})
    assert mask(preset, 5) == "FFc.F"
    assert mask(preset, 6) == "F..F.F"


def guarded(steps: str, extra_steps: int, order: int = 1) -> Plan:
    row = Preset(masks={len(steps): steps}, forecast_order=order, guard=Guard(0.1, extra_steps))
    return plan(row, len(steps))


def test_a_guard_may_run_as_many_steps_of_each_gap_as_it_has() -> None:
    assert guarded("FFF...F.c.F", 1).may_run_too == (3, 7, 9)
    assert guarded("FFF...F.c.F", 2).may_run_too == (3, 4, 7, 9)
    assert guarded("FFF...F.c.F", 9).may_run_too == (3, 4, 5, 7, 9)
    assert [guarded("FFF...F.c.F", extra).extra_steps_at_most for extra in (1, 2, 9)] == [1, 2, 5]
    unguarded = plan(Preset(masks={3: "F.F"}), 3)
    assert (unguarded.may_run_too, unguarded.extra_steps_at_most) == ((), 0)


@pytest.mark.parametrize(
    ("mask", "by_order"),
    [
        ("FF...F", ((2, 3, 4), ())),
        ("FF...c", ((2, 3, 4), ())),
        ("F...F..F", ((5, 6), ())),
        ("F.F.F.F", ((3, 5), (5,))),
        ("F.....F", ((), ())),
        ("FFF", ((), ())),
    ],
)
def test_a_guard_cannot_act_before_a_forecast_can_be_held_against_a_step(
    mask: str, by_order: tuple[tuple[int, ...], ...]
) -> None:
    for order, steps in enumerate(by_order):
        found = guarded(mask, 3, order)
        assert (found.may_run_too, found.extra_steps_at_most) == (steps, min(3, len(steps)))
