"""The rows that a calibration tries."""

from __future__ import annotations

from itertools import combinations

import pytest
from kontextd_models import Acceleration
from kontextd_models.acceleration.planning import plan
from kontextd_models.acceleration.preset import Guard, Preset
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.trials.candidates import candidates, exact, name_of, summary_of

PRESENT = read_table(SHIPPED).rows


@pytest.mark.parametrize("steps", [2, 6, 28, 30, 50])
def test_no_two_do_the_same_and_none_of_them_is_exact(steps: int) -> None:
    found = candidates(steps, PRESENT)
    assert found == candidates(steps, PRESENT)
    for one, other in combinations(found, 2):
        skips = "." in one.mask
        assert one.mask != other.mask or (skips and one.row.forecast_order != other.row.forecast_order)
    assert all(set(one.mask) != {"F"} for one in found)
    assert all(one.mask == "".join(plan(one.row, steps).kinds) for one in found)


def test_the_rows_in_force_come_first_and_the_published_shares_are_all_there() -> None:
    found = candidates(28, PRESENT)
    assert [one.row for one in found[:2]] == [PRESENT[Acceleration.REGULAR], PRESENT[Acceleration.HIGH]]
    assert {round(28 * one.computed_share) for one in found} == {19, 18, 15, 13, 11, 8}
    assert {one.row.prefix for one in found} == {3, 4, 6}
    assert {one.row.refreshes for one in found if one.row.reuse_reference} == {0, 1, 2}
    assert {one.row.forecast_order for one in found} == {0, 1}
    assert {one.row.reuse_reference for one in found} == {False, True}


def test_a_row_with_a_guard_is_another_than_the_same_without() -> None:
    row = Preset(computed=15 / 28, prefix=4, modulation_ahead=True, guard=Guard(0.1, 2))
    found = candidates(28, {Acceleration.NONE: Preset(), Acceleration.HIGH: row})
    assert [one.row.guard for one in found if one.mask == found[0].mask and one.row.forecast_order] == [row.guard, None]


def test_a_name_says_what_the_steps_do() -> None:
    row = Preset(computed=0.5, prefix=4, reuse_reference=True, refreshes=2, forecast_order=0, guard=Guard(0.1, 3))
    assert name_of(row, 28) == "14 of 28 steps, 4 first, reference kept, 2 refreshes, last velocity, guard up to 3"
    assert summary_of(row, 28) == (
        "14 of 28 steps: 4 in full, 2 refreshes, the others with the reference kept; the rest takes the last velocity"
    )
    assert name_of(Preset(computed=0.5, prefix=3), 28) == "14 of 28 steps, 3 first"
    assert summary_of(Preset(computed=0.5, prefix=3), 28) == "14 of 28 steps: all in full; the rest is forecast"
    assert name_of(Preset(masks={4: "Fc.F"}), 4) == "3 of 4 steps, 1 first, reference kept, 1 refresh"
    assert exact(3).mask == "FFF"
    assert exact(3).row.is_exact
