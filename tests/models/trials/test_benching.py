"""The presets side by side, on a tiny model with a table of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_lora
from kontextd_models import Acceleration, EditRequest, EngineConfig, LoraWeight, SafetyConfig, load_engine
from kontextd_models.acceleration.preset import Preset
from kontextd_models.engine import Engine
from kontextd_models.errors import InvalidValue
from kontextd_models.fidelity import psnr, ssim
from kontextd_models.trials.benching import Round, bench, count_rounds
from kontextd_models.trials.cases import Case, LoraSet
from kontextd_models.trials.running import Manner, Runner, machine
from kontextd_models.trials.tally import Tally, mean_db
from PIL import Image

MANNER = Manner(steps=6, seed=3, is_checked=False)
NONE, REGULAR, HIGH = Acceleration


@pytest.fixture
def engine(tiny_engine: Engine) -> Engine:
    """Its regular is `none` by another name, so that equal pictures are met."""
    rows = {NONE: Preset(), REGULAR: Preset(), HIGH: Preset(computed=0.5, prefix=2, reuse_reference=True)}
    tiny_engine.presets = replace(tiny_engine.presets, rows=rows)
    return tiny_engine


@pytest.fixture
def cases(photo: Callable[[int, int], Image.Image], tmp_path: Path) -> list[Case]:
    ink = LoraSet((LoraWeight(tiny_lora.write(tmp_path / "ink.safetensors"), 0.7),))
    small, wide = photo(64, 64), photo(80, 48)
    return [
        Case("small", small, "x", LoraSet()),
        Case("small", small, "y", LoraSet()),
        Case("wide", wide, "x", LoraSet()),
        Case("small", small, "x", ink),
    ]


@pytest.fixture
def rounds(engine: Engine, cases: list[Case]) -> list[Round]:
    return list(bench(Runner(engine, MANNER), cases, repeats=2))


def test_a_picture_is_what_a_request_for_the_preset_gets(
    engine: Engine, cases: list[Case], rounds: list[Round]
) -> None:
    for made in rounds:
        for name, run in made.runs.items():
            request = EditRequest(
                made.case.image,
                made.case.prompt,
                MANNER.steps,
                MANNER.seed,
                loras=made.case.loras.loras,
                acceleration=name,
                enable_safety_checker=False,
            )
            *_, done = engine.edit(request)
            assert run.image.tobytes() == done.images[0].tobytes()
            assert (run.use.full, run.use.cached, run.use.skipped) == (
                done.preset.full,
                done.preset.cached,
                done.preset.skipped,
            )


def test_every_case_is_compared_once_and_each_size_timed_often_enough(cases: list[Case], rounds: list[Round]) -> None:
    assert [made.case for made in rounds] == [*cases[:2], cases[2], cases[2], cases[3], cases[3]]
    assert len(rounds) == count_rounds(cases, 2)
    assert [bool(made.likeness) for made in rounds] == [True, True, True, False, True, False]
    exact, high = rounds[0].runs[NONE].image, rounds[0].runs[HIGH].image
    assert rounds[0].likeness[REGULAR].psnr == math.inf
    assert rounds[0].likeness[HIGH].psnr == psnr(high, exact)
    assert rounds[0].likeness[HIGH].ssim == ssim(high, exact)


def test_the_table_of_the_engine_is_as_it_was(engine: Engine, cases: list[Case]) -> None:
    before = engine.presets
    runner = Runner(engine, MANNER)
    runner.run(cases[0], Preset(computed=0.4, prefix=1))
    with pytest.raises(InvalidValue, match="num_inference_steps"):
        Runner(engine, replace(MANNER, steps=99)).run(cases[0], Preset())
    assert engine.presets is before


def test_a_flagged_picture_of_none_is_no_measure(tiny_folder: Path, cases: list[Case]) -> None:
    flagging = load_engine(EngineConfig(tiny_folder, "cpu", safety=SafetyConfig(threshold=0)))
    with pytest.raises(InvalidValue, match=r"flagged the edit of small, 'x', no LoRA, .* Use another photo or prompt"):
        Runner(flagging, replace(MANNER, is_checked=True)).exact(cases[0])


def test_the_tally_has_medians_and_means_by_size_and_loras(rounds: list[Round]) -> None:
    tally = Tally()
    for made in rounds:
        tally.add(made)
    speeds = {(row.loras, row.size, row.preset): row for row in tally.speeds()}
    assert len(speeds) == 9
    high = speeds["no LoRA", (64, 64), HIGH]
    assert (high.edits, high.use.full, high.use.cached, high.use.skipped) == (2, 2, 1, 3)
    taken = sorted(made.runs[HIGH].timings["denoise"] for made in rounds[:2])
    assert high.seconds["denoise"] == pytest.approx(sum(taken) / 2)
    assert high.slowest_denoise_s == taken[1]
    none = speeds["no LoRA", (64, 64), NONE]
    assert high.denoise_speedup == pytest.approx(none.seconds["denoise"] / high.seconds["denoise"])
    assert (none.denoise_speedup, none.total_speedup) == (1, 1)
    fidelity = {(row.loras, row.preset): row for row in tally.fidelities()}
    assert set(fidelity) == {("no LoRA", REGULAR), ("no LoRA", HIGH), ("ink:0.7", REGULAR), ("ink:0.7", HIGH)}
    assert (fidelity["no LoRA", REGULAR].mean_psnr, fidelity["no LoRA", REGULAR].worst_psnr) == (60, math.inf)
    found = [made.likeness[HIGH].psnr for made in rounds[:3]]
    assert fidelity["no LoRA", HIGH].mean_psnr == pytest.approx(sum(found) / 3)
    assert fidelity["no LoRA", HIGH].worst_psnr == min(found)
    assert len(tally.compared) == 8


def test_an_equal_picture_does_not_lift_a_mean_over_any_gate() -> None:
    assert mean_db([math.inf, 20.0]) == 40.0
    assert mean_db([30.0, 32.0]) == 31.0


def test_a_machine_is_told_by_device_and_model(engine: Engine) -> None:
    found = machine(engine)
    assert found["device_name"] == "CPU"
    assert isinstance(found["model"], dict)
    assert (found["model"]["name"], found["model"]["dtype"]) == ("tiny random model", "float32")
