"""A sweep keeps to its budget. Runners and the clock are made up here: an edit takes the seconds it is said to take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kontextd_models import Acceleration, LoraWeight, PresetUse
from kontextd_models.acceleration.planning import plan
from kontextd_models.acceleration.preset import Preset, StepKind
from kontextd_models.errors import InvalidValue, OutOfMemory
from kontextd_models.trials.candidates import candidates, exact
from kontextd_models.trials.cases import Case, LoraSet
from kontextd_models.trials.running import Run
from kontextd_models.trials.sweeping import TURNS, Budget, Sweep
from PIL import Image

STEPS, STEP_S, REST_S = 10, 1.0, 2.0
INK = LoraSet((LoraWeight(Path("ink.safetensors"), 1.0),))  # never opened
ROWS = candidates(STEPS, {Acceleration.NONE: Preset()})


class Runner:
    """Each step that runs takes a second; a picture is the further off the more steps are skipped, and with ink."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.now, self.slowdown, self.edits = 0.0, slowdown, 0
        self.rows: list[Preset] = []
        self.fails_at: set[int] = set()  # numbers of edits
        self.level_of: dict[LoraSet, int] = {}  # added to a picture

    def warm_up(self, cases: list[Case]) -> None:
        self.now += len(cases)

    def none(self, case: Case) -> Run:
        return self.run(case, Preset())

    exact = none

    def run(self, case: Case, row: Preset) -> Run:
        self.rows.append(row)
        if self.edits in self.fails_at:
            raise OutOfMemory("the device has no room")
        kinds = plan(row, STEPS).kinds
        skipped = kinds.count(StepKind.SKIPPED)
        denoise_s = (STEPS - skipped) * STEP_S * (1 if self.edits == 0 else self.slowdown)
        self.now += denoise_s + REST_S
        self.edits += 1
        level = 100 + skipped + (9 if case.loras.loras and skipped else 0) + self.level_of.get(case.loras, 0)
        image = Image.fromarray(np.full((16, 16, 3), level, np.uint8))
        return Run(image, {"denoise": denoise_s, "total": denoise_s + REST_S}, PresetUse(), False)


def case(prompt: str, loras: LoraSet = LoraSet()) -> Case:  # noqa: B008
    return Case("photo", Image.new("RGB", (16, 16)), prompt, loras)


def swept(runner: Runner, cases: list[Case], seconds: float) -> Sweep:
    sweep = Sweep(cases, Budget(seconds, lambda: runner.now))
    list(sweep.make_references(runner))
    list(sweep.run(runner, "float32", ROWS, sweep.budget.left()))
    return sweep


def test_with_time_enough_every_row_is_tried_in_order() -> None:
    runner = Runner()
    sweep = swept(runner, [case("x"), case("y")], 1e6)
    assert [point.candidate for point in sweep.points] == ROWS
    assert (sweep.not_reached, sweep.left_out) == ([], 0)
    first = sweep.points[0]
    assert first.ratio == pytest.approx(first.candidate.computed_share)
    assert sweep.reference_denoise_s == STEPS * STEP_S


@pytest.mark.parametrize("seconds", [110.0, 130.0, 200.0])
@pytest.mark.parametrize("slowdown", [1.0, 1.7])
def test_it_ends_in_time_and_says_what_it_did_not_get_to(seconds: float, slowdown: float) -> None:
    runner = Runner(slowdown)
    sweep = swept(runner, [case("x")], seconds)
    assert runner.now <= seconds + (STEPS * STEP_S * slowdown + REST_S)  # an edit that has begun is not broken off
    assert sweep.points
    tried = [point.candidate for point in sweep.points]
    passed_over = [candidate for _, candidate in sweep.not_reached]
    assert passed_over
    assert sorted(map(ROWS.index, [*tried, *passed_over])) == list(range(len(ROWS)))


def test_cases_are_left_out_evenly_where_the_budget_has_no_room_for_them() -> None:
    cases = [case(str(number)) for number in range(20)] + [case(str(number), INK) for number in range(20)]
    sweep = swept(Runner(), cases, 700)
    assert len(sweep.cases) == 8
    assert sweep.left_out == 32
    assert [case.prompt for case in sweep.cases] == ["0", "5", "10", "15"] * 2
    assert {case.loras.name for case in sweep.cases} == {"no LoRA", "ink:1"}


def test_the_worst_mean_over_the_sets_of_loras_is_told() -> None:
    sweep = swept(Runner(), [case("x"), case("x", INK)], 1e6)
    point = sweep.points[0]
    assert point.mean_psnr["ink:1"] < point.mean_psnr["no LoRA"]
    assert point.psnr == point.mean_psnr["ink:1"]
    assert point.worst_picture == "photo, 'x', ink:1"


def test_two_loras_of_one_name_are_each_held_against_their_own_none() -> None:
    sets = [LoraSet((LoraWeight(Path(place) / "ink.safetensors", 1.0),)) for place in ("a", "b")]
    runner = Runner()
    runner.level_of = {sets[1]: 60}
    point = swept(runner, [case("x", loras) for loras in sets], 1e6).points[0]
    assert sets[0].name == sets[1].name
    assert point.worst_picture_psnr > 20  # 60 levels are 13 dB


def test_a_budget_that_no_edit_fits_is_refused_with_one_that_does() -> None:
    runner = Runner()
    sweep = Sweep([case("x"), case("x", INK)], Budget(60, lambda: runner.now))
    with pytest.raises(
        InvalidValue, match=r"budget is 60 s; an edit takes 12.0 s here, and 2 of them .* at least 252 s"
    ):
        list(sweep.make_references(runner))


def test_a_row_too_large_for_the_device_is_told_apart_from_one_without_time() -> None:
    runner = Runner()
    runner.fails_at = {2}  # after `none`: a row's first edit, and those after it, which are not counted
    sweep = Sweep([case("x"), case("y")], Budget(1e6, lambda: runner.now))
    list(sweep.make_references(runner))
    assert list(sweep.run(runner, "float32", ROWS[:3], 1e6)) == []
    assert sweep.too_large == [("float32", row) for row in ROWS[:3]]
    assert (sweep.points, sweep.not_reached) == ([], [])


def test_finalists_are_timed_in_turns_with_none_whatever_slowed_the_machine_since() -> None:
    runner = Runner(slowdown=1.7)  # since the first edit
    sweep = swept(runner, [case("x"), case("y", INK)], 1e6)
    finalists = sweep.points[:2]
    assert all(point.ratio > 1.3 * point.candidate.computed_share for point in finalists)
    before, runner.rows = list(sweep.points), []
    assert list(sweep.run_off(runner, finalists, 1e6)) == list(range(1, TURNS + 1))
    for point, was in zip(sweep.points[:2], finalists, strict=True):
        assert point.ratio == pytest.approx(point.candidate.computed_share)
        assert (point.turns, point.psnr) == (TURNS, was.psnr)
    assert sweep.points[2:] == before[2:]
    none, one, other = Preset(), finalists[0].candidate.row, finalists[1].candidate.row
    assert runner.rows[:9] == [none, one, other, one, other, none, other, none, one]


def test_another_precision_is_timed_against_its_own_none_and_held_to_the_first_ones() -> None:
    runner = Runner()
    sweep = Sweep([case("x")], Budget(1e6, lambda: runner.now))
    list(sweep.make_references(runner))
    list(sweep.run(runner, "float32", ROWS[:1], 1e6))
    runner.slowdown = 0.5
    list(sweep.run(runner, "fp8", [exact(STEPS), ROWS[0]], 1e6))
    runner.slowdown = 0.8  # since then
    list(sweep.run_off(runner, [sweep.points[2]], 1e6))
    assert sweep.points[2].ratio == pytest.approx(0.5 * ROWS[0].computed_share)
    assert [point.turns for point in sweep.points] == [0, 0, TURNS]


@pytest.mark.parametrize("seconds", [60.0, 100.0, 150.0])
@pytest.mark.parametrize("slowdown", [0.5, 1.0, 1.5, 3.0])
def test_a_precision_whose_own_none_is_slower_keeps_to_its_time_too(seconds: float, slowdown: float) -> None:
    """A row is begun only where all its edits fit, and is then not given up: what has run counts."""
    runner = Runner()
    sweep = Sweep([case("x"), case("y")], Budget(1e6, lambda: runner.now))
    list(sweep.make_references(runner))
    list(sweep.run(runner, "float32", ROWS[:1], 1e6))
    runner.slowdown = slowdown
    list(sweep.run(runner, "fp8", [exact(STEPS)], 1e6))
    began, edits = runner.now, runner.edits
    points = list(sweep.run(runner, "fp8", ROWS, seconds))
    assert points
    assert runner.now - began <= seconds
    assert runner.edits - edits == 2 * len(points)


@pytest.mark.parametrize(("seconds", "rounds"), [(46.0, 0), (50.0, 1), (160.0, 3)])
def test_turns_of_a_slower_precision_end_in_time(seconds: float, rounds: int) -> None:
    """A round is `none`, 32 s, and 16.4 s or 18.2 of the rows: that of `none` in full precision would be 12 s."""
    runner = Runner()
    sweep = Sweep([case("x")], Budget(1e6, lambda: runner.now))
    list(sweep.make_references(runner))
    list(sweep.run(runner, "float32", ROWS[:1], 1e6))
    runner.slowdown = 3.0
    list(sweep.run(runner, "fp8", [exact(STEPS), ROWS[0]], 1e6))
    began = runner.now
    assert len(list(sweep.run_off(runner, sweep.points[-1:], seconds))) == rounds
    assert runner.now - began <= seconds


def test_without_its_none_another_precision_is_not_timed_again() -> None:
    runner = Runner()
    sweep = swept(runner, [case("x")], 1e6)
    list(sweep.run(runner, "fp8", ROWS[:1], 1e6))
    assert list(sweep.run_off(runner, sweep.points[-1:], 1e6)) == []


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 0), (30.0, 1), (60.0, 3)])
def test_turns_end_in_time(seconds: float, rounds: int) -> None:
    runner = Runner()
    sweep = swept(runner, [case("x")], 1e6)
    began = runner.now
    assert len(list(sweep.run_off(runner, sweep.points[:1], seconds))) == rounds
    assert runner.now - began <= seconds
    assert sweep.points[0].turns == rounds


def test_memory_that_is_gone_ends_the_turns_and_keeps_what_is_known() -> None:
    runner = Runner()
    sweep = swept(runner, [case("x")], 1e6)
    for turn in sweep.run_off(runner, sweep.points[:1], 1e6):
        assert turn == 1
        runner.fails_at = {runner.edits}
    assert sweep.points[0].turns == 1


def test_nothing_in_the_finals_is_nothing_to_time() -> None:
    assert list(swept(Runner(), [case("x")], 1e6).run_off(Runner(), [], 1e6)) == []


def test_what_is_spent_already_is_off_the_budget() -> None:
    assert Budget(60, lambda: 5.0, spent=20).left() == 40
