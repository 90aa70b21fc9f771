"""The rows that a calibration tries."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from kontextd_models import Acceleration
from kontextd_models.acceleration.planning import plan
from kontextd_models.acceleration.preset import SHORTCUTS, Guard, Preset
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


def test_rows_that_differ_in_the_guard_alone_are_all_tried_under_names_of_their_own() -> None:
    row = Preset(computed=15 / 28, prefix=4)
    guards = [Guard(0.1, 2), Guard(0.2, 2), Guard(0.1, 3)]
    names = [Acceleration.REGULAR, Acceleration.HIGH]
    found = {
        (one.row.guard, one.name)
        for pair in combinations(guards, 2)
        for one in candidates(28, {name: replace(row, guard=guard) for name, guard in zip(names, pair, strict=True)})
        if one.row.guard
    }
    assert found == {
        (guard, f"15 of 28 steps, 4 first, guard up to {n} at {r}")
        for guard, n, r in zip(guards, (2, 2, 3), (0.1, 0.2, 0.1), strict=True)
    }


def test_a_guard_that_cannot_act_makes_no_other_row() -> None:
    """It cannot after two steps that ran; and one that adds up to nine adds one where one is skipped."""
    short = [Preset(masks={5: "FF..F"}, guard=guard) for guard in (None, Guard(0.1, 2))]
    spare = [Preset(masks={5: "FFF.F"}, guard=Guard(0.1, extra)) for extra in (1, 9)]
    for rows in (short, spare):
        present = dict(zip([Acceleration.REGULAR, Acceleration.HIGH], rows, strict=True))
        found = [one for one in candidates(5, present) if one.row.masks]
        assert [one.row.guard for one in found] == [rows[0].guard]
    assert name_of(short[1], 5) == "3 of 5 steps, 2 first"


def test_a_row_in_force_is_tried_with_the_shortcuts_that_its_published_twin_has() -> None:
    row = Preset(computed=15 / 28, prefix=4)
    first = candidates(28, {Acceleration.NONE: Preset(), Acceleration.HIGH: row})[0]
    assert first.row == replace(SHORTCUTS, computed=row.computed, prefix=4)


def test_a_name_says_what_the_steps_do() -> None:
    row = Preset(computed=0.5, prefix=4, reuse_reference=True, refreshes=2, forecast_order=0, guard=Guard(0.1, 3))
    assert (
        name_of(row, 28) == "14 of 28 steps, 4 first, reference kept, 2 refreshes, last velocity, guard up to 3 at 0.1"
    )
    assert summary_of(row, 28) == (
        "14 of 28 steps: 4 in full, 2 refreshes, the others with the reference kept; the rest takes the last velocity"
    )
    assert name_of(Preset(computed=0.5, prefix=3), 28) == "14 of 28 steps, 3 first"
    assert summary_of(Preset(computed=0.5, prefix=3), 28) == "14 of 28 steps: all in full; the rest is forecast"
    assert name_of(Preset(masks={4: "Fc.F"}), 4) == "3 of 4 steps, 1 first, reference kept, 1 refresh"
    assert summary_of(Preset(computed=0.5, prefix=3), 3) == "every step, every token"
    assert exact(3).mask == "FFF"
    assert exact(3).row.is_exact
