"""The front and the choice, on points made up here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_models import Acceleration
from kontextd_models.acceleration.preset import Preset
from kontextd_models.acceleration.table import read_table
from kontextd_models.trials.candidates import Candidate, exact
from kontextd_models.trials.choosing import Choice, choose, fastest, finalists, front
from kontextd_models.trials.settling import rows_of, table_of
from kontextd_models.trials.sweeping import Point

GATES = {Acceleration.REGULAR: 31.0, Acceleration.HIGH: 28.0}
ROW = Preset(computed=0.5, prefix=4, reuse_reference=True, refreshes=1, modulation_ahead=True)


def point(ratio: float, psnr: float, precision: str = "bfloat16", with_lora: float = 99.0) -> Point:
    means = {"no LoRA": psnr, "ink:1": max(psnr, with_lora)}
    return Point(precision, Candidate(f"{ratio} {psnr}", ROW, "F"), ratio, ratio * 8, means, psnr - 3, "a photo")


def test_the_front_holds_what_nothing_else_beats() -> None:
    best = [point(0.3, 25), point(0.5, 30), point(0.7, 36)]
    beaten = [point(0.6, 30), point(0.5, 29), point(0.9, 36), point(0.7, 20)]
    assert front([*beaten, *best]) == best
    assert front([]) == []


def test_the_fastest_that_meets_the_gate_is_taken() -> None:
    assert fastest([point(0.3, 30.9), point(0.5, 31.0), point(0.4, 40), point(0.4, 35)], 31) == point(0.4, 40)


def test_nothing_is_taken_under_the_gate_or_slower_than_none() -> None:
    assert fastest([point(0.2, 30.99), point(1.0, 60), point(1.2, 60)], 31) is None


def test_finalists_are_the_few_fastest_near_the_fastest_of_each_gate() -> None:
    low, high = (
        [point(0.3, 28.5), point(0.35, 29), point(0.5, 29)],
        [point(ratio, 33) for ratio in (0.6, 0.61, 0.62, 0.63, 0.64)],
    )
    assert finalists([*high, point(0.1, 20), *low], GATES) == [*high[:4], *low[:2]]
    assert finalists([point(1.1, 40)], GATES) == [point(1.1, 40)]  # a machine that was slowed down
    assert finalists([point(0.1, 20)], GATES) == []


def test_of_those_that_were_timed_again_one_wins() -> None:
    timed, slower = replace(point(0.5, 33), turns=5), replace(point(0.55, 33), turns=5)
    assert fastest([point(0.4, 33), slower, timed], 31) == timed
    assert fastest([point(0.4, 33), replace(point(1.0, 33), turns=5)], 31) is None
    assert fastest([point(0.4, 33), replace(point(0.2, 20), turns=5)], 31) == point(0.4, 33)


def test_the_worst_set_of_loras_is_held_to_the_gate() -> None:
    good = Point("", Candidate("", ROW, "F"), 0.5, 4, {"no LoRA": 40, "ink:1": 30}, 20, "")
    assert good.psnr == 30
    assert fastest([good], 31) is None


def test_each_preset_gets_its_own_row_or_none() -> None:
    points = [point(0.3, 28.5), point(0.6, 33), point(0.2, 20)]
    assert choose(points, GATES, "bfloat16").points == {Acceleration.REGULAR: points[1], Acceleration.HIGH: points[0]}
    assert choose(points[2:], GATES, "bfloat16").points == {Acceleration.REGULAR: None, Acceleration.HIGH: None}
    assert choose([], GATES, "bfloat16").precision == "bfloat16"


def test_another_precision_is_taken_where_its_rows_are_faster_and_all_there() -> None:
    exact = [point(0.3, 29), point(0.6, 33)]
    low = [point(0.2, 29, "fp8"), point(0.4, 32, "fp8")]
    assert choose([*exact, *low], GATES, "bfloat16").precision == "fp8"
    assert choose([*exact, low[0]], GATES, "bfloat16").precision == "bfloat16"
    assert choose([*low[:1]], GATES, "bfloat16") == Choice("bfloat16", dict.fromkeys(GATES))


@pytest.mark.parametrize("missed", [(), (Acceleration.REGULAR,), tuple(GATES)])
def test_a_table_of_the_choice_is_read_as_it_was_written_and_exact_where_nothing_fits(
    missed: tuple[Acceleration, ...], tmp_path: Path
) -> None:
    choice = Choice("fp8", {name: None if name in missed else point(0.5, 33) for name in GATES})
    none = Preset(modulation_ahead=True)
    rows = rows_of(choice, none, GATES, steps=30)
    file = tmp_path / "presets.json"
    file.write_text(json.dumps(table_of("a test", "fp8", rows)))
    read = read_table(file)
    assert (read.rows, read.about, read.precision) == (rows, "a test", "fp8")
    assert read.rows[Acceleration.NONE] == none
    for name in GATES:
        assert read.rows[name].is_exact == (name in missed)
        told = f"no row that was tried meets {GATES[name]:g} dB" if name in missed else "15 of 30 steps: 4 in full"
        assert told in read.rows[name].summary
        assert read.rows[name].summary.endswith(" (as measured at 30 steps)") == (name not in missed)


def test_an_exact_row_that_is_chosen_says_so_for_any_number_of_steps() -> None:
    faster = Point("fp8", exact(30), 0.6, 4.8, {"no LoRA": 40}, 37, "a photo")
    rows = rows_of(Choice("fp8", dict.fromkeys(GATES, faster)), Preset(), GATES, steps=30)
    assert {rows[name].summary for name in GATES} == {"every step, every token"}
