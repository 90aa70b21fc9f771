"""Presets through the engine's door: any steps, any number of images, broken off or not, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_lora
from kontextd_models import Acceleration, Done, EditRequest, EngineConfig, LoraWeight, ResolutionMode, load_engine
from kontextd_models.acceleration.preset import SHORTCUTS, Guard, Preset
from kontextd_models.acceleration.table import PresetTable, row_as_json
from kontextd_models.engine import Engine
from kontextd_models.errors import ModelError
from PIL import Image

Photo = Callable[[int, int], Image.Image]
REUSING = replace(SHORTCUTS, computed=0.6, prefix=2, reuse_reference=True, refreshes=1)
SKIPPING = replace(SHORTCUTS, computed=0.4, prefix=2)


@pytest.fixture
def engine(tiny_engine: Engine) -> Engine:
    """With rows that use every mechanism."""
    tiny_engine.presets = PresetTable(
        {Acceleration.NONE: Preset(), Acceleration.REGULAR: REUSING, Acceleration.HIGH: SKIPPING}, Path("of-the-test")
    )
    return tiny_engine


def run(engine: Engine, request: EditRequest) -> Done:
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def pixels(done: Done) -> list[np.ndarray]:
    return [np.asarray(image) for image in done.images]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 28, 50])
@pytest.mark.parametrize("preset", [Acceleration.REGULAR, Acceleration.HIGH])
def test_a_preset_takes_any_number_of_steps_and_tells_how_they_were_carried_out(
    engine: Engine, tiny_request: EditRequest, preset: Acceleration, steps: int
) -> None:
    request = replace(tiny_request, acceleration=preset, num_inference_steps=steps, num_images=2)
    use = run(engine, request).preset
    assert use.name is preset
    assert use.full + use.cached + use.skipped == 2 * steps
    share = engine.presets.rows[preset].computed
    assert use.full + use.cached == 2 * max(int(share * steps + 0.5), min(3, steps))
    assert (use.cached > 0) == (preset is Acceleration.REGULAR and steps > 5)


def test_none_runs_every_step_in_full(engine: Engine, tiny_request: EditRequest) -> None:
    use = run(engine, tiny_request).preset
    assert (use.name, use.full, use.cached, use.skipped) == (Acceleration.NONE, 3, 0, 0)


@pytest.mark.parametrize("preset", [Acceleration.REGULAR, Acceleration.HIGH])
def test_a_preset_is_an_approximation_of_none(engine: Engine, tiny_request: EditRequest, preset: Acceleration) -> None:
    request = replace(tiny_request, num_inference_steps=12)
    exact, fast = pixels(run(engine, request))[0], pixels(run(engine, replace(request, acceleration=preset)))[0]
    assert exact.shape == fast.shape
    assert not np.array_equal(exact, fast)


@pytest.mark.parametrize("preset", list(Acceleration))
def test_an_image_of_several_is_to_the_bit_the_one_of_its_seed(
    engine: Engine, tiny_request: EditRequest, preset: Acceleration
) -> None:
    request = replace(tiny_request, acceleration=preset, num_inference_steps=8, seed=40, num_images=4)
    several = pixels(run(engine, request))
    for index, picture in enumerate(several):
        alone = replace(request, seed=40 + index, num_images=1)
        assert np.array_equal(pixels(run(engine, alone))[0], picture)


@pytest.mark.parametrize("preset", list(Acceleration))
@pytest.mark.parametrize("steps_taken", [1, 4, 6, 9])
def test_after_an_edit_that_was_given_up_the_next_one_is_that_of_a_fresh_engine(
    tiny_folder: Path, engine: Engine, tiny_request: EditRequest, preset: Acceleration, steps_taken: int
) -> None:
    request = replace(tiny_request, acceleration=preset, num_inference_steps=10)
    fresh = load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    fresh.presets = engine.presets
    expected = pixels(run(fresh, request))[0]
    given_up = engine.edit(replace(request, seed=99, prompt="another", acceleration=Acceleration.REGULAR))
    for _ in range(steps_taken):
        next(given_up)
    given_up.close()
    assert np.array_equal(pixels(run(engine, request))[0], expected)


ELSEWHERE = """
import hashlib, sys
from pathlib import Path
from kontextd_models import Acceleration, EditRequest, EngineConfig, load_engine
from PIL import Image
model, presets, photo = map(Path, sys.argv[1:4])
engine = load_engine(EngineConfig(model=model, device="cpu", presets=presets))
preset = Acceleration(sys.argv[4])
request = EditRequest(Image.open(photo), "make it red", 10, 3, acceleration=preset, enable_safety_checker=False)
*_, done = engine.edit(request)
print(hashlib.sha256(done.images[0].tobytes()).hexdigest())
"""


@pytest.mark.parametrize("preset", [Acceleration.REGULAR, Acceleration.HIGH])
def test_after_an_edit_that_was_given_up_the_next_one_is_that_of_a_fresh_process(
    tiny_folder: Path, engine: Engine, photo: Photo, tmp_path: Path, preset: Acceleration
) -> None:
    guarded = replace(REUSING, guard=Guard(1e-6, 2), masks={10: "FFFc.c.F.c"})
    rows = {**engine.presets.rows, Acceleration.REGULAR: guarded}
    engine.presets = replace(engine.presets, rows=rows)
    table, file = tmp_path / "presets.json", tmp_path / "photo.png"
    table.write_text(json.dumps({"presets": {name.value: row_as_json(row) for name, row in rows.items()}}))
    photo(64, 64).save(file)
    request = EditRequest(photo(64, 64), "make it red", 10, 3, acceleration=preset, enable_safety_checker=False)
    given_up = engine.edit(replace(request, seed=99, prompt="another", acceleration=Acceleration.REGULAR))
    for _ in range(6):  # among cached steps
        next(given_up)
    given_up.close()
    found = hashlib.sha256(pixels(run(engine, request))[0].tobytes()).hexdigest()
    command = [sys.executable, "-c", ELSEWHERE, str(tiny_folder), str(table), str(file), preset.value]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == found


def test_after_an_edit_that_failed_the_next_one_is_that_of_a_fresh_engine(
    tiny_folder: Path, engine: Engine, tiny_request: EditRequest
) -> None:
    request = replace(tiny_request, acceleration=Acceleration.REGULAR, num_inference_steps=10)
    fresh = load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    fresh.presets = engine.presets
    expected = pixels(run(fresh, request))[0]
    edit = engine.edit(replace(request, seed=99))
    for _ in range(5):
        next(edit)

    def explode(*_: object) -> None:
        raise RuntimeError("in the middle")

    last = engine.model.pipeline.transformer.single_transformer_blocks[-1].proj_mlp
    handle = last.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="in the middle"):
        for _ in edit:
            pass
    handle.remove()
    assert np.array_equal(pixels(run(engine, request))[0], expected)


def test_another_size_after_a_run_with_kept_keys_works(engine: Engine, tiny_request: EditRequest, photo: Photo) -> None:
    request = replace(tiny_request, acceleration=Acceleration.REGULAR, num_inference_steps=8)
    assert run(engine, request).images[0].size == (64, 64)
    wide = replace(request, image=photo(128, 64), resolution_mode=ResolutionMode.R1_1)
    done = run(engine, wide)
    assert (done.size.width, done.size.height) != (done.size.reference_width, done.size.reference_height)
    assert done.preset.cached > 0


def test_previews_come_from_skipped_steps_too(engine: Engine, tiny_request: EditRequest) -> None:
    request = replace(tiny_request, acceleration=Acceleration.HIGH, num_inference_steps=10, preview_interval=1)
    steps = [event for event in engine.edit(request) if not isinstance(event, Done)]
    assert len(steps) == 10
    assert sum(step.preview is not None for step in steps) >= 1


def test_loras_are_merged_under_every_preset(
    tiny_folder: Path, engine: Engine, tiny_request: EditRequest, tmp_path: Path
) -> None:
    lora = LoraWeight(tiny_lora.write(tmp_path / "lora.safetensors"), 1.0)
    for preset in Acceleration:
        request = replace(tiny_request, acceleration=preset, num_inference_steps=8)
        before = pixels(run(engine, request))[0]
        styled = pixels(run(engine, replace(request, loras=(lora,))))[0]
        assert not np.array_equal(before, styled)
        assert np.array_equal(pixels(run(engine, request))[0], before)


def test_a_guard_is_reported_in_the_steps_that_ran(engine: Engine, tiny_request: EditRequest) -> None:
    wary = replace(SKIPPING, guard=Guard(residual=1e-6, extra_steps=2))
    plain = run(engine, replace(tiny_request, acceleration=Acceleration.HIGH, num_inference_steps=12)).preset
    engine.presets = replace(engine.presets, rows={**engine.presets.rows, Acceleration.HIGH: wary})
    guarded = run(engine, replace(tiny_request, acceleration=Acceleration.HIGH, num_inference_steps=12)).preset
    assert guarded.full == plain.full + 2
    assert guarded.skipped == plain.skipped - 2


def test_a_table_that_the_operator_names_is_the_one_in_force(tiny_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "mine.json"
    table.write_text('{"presets": {"none": {}, "regular": {"computed": 0.5}, "high": {"computed": 0.1}}}')
    engine = load_engine(EngineConfig(model=tiny_folder, device="cpu", presets=table))
    assert engine.presets.file == table
    assert engine.presets.rows[Acceleration.HIGH].computed == 0.1


def test_a_faulty_table_is_refused_when_the_model_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.json is missing"):
        load_engine(EngineConfig(model=tiny_folder, device="cpu", presets=tmp_path / "nothing.json"))
