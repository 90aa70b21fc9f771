"""The engine's door: what comes out of it, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kontextd_models import (
    Done,
    EditRequest,
    EngineConfig,
    ResolutionMode,
    SafetyConfig,
    Step,
    load_engine,
)
from kontextd_models.encode import prepare_reference
from kontextd_models.engine import Engine
from kontextd_models.errors import (
    AspectRatioOutOfRange,
    ContentPolicyViolation,
    ImageTooSmall,
    InvalidValue,
)
from kontextd_models.limits import ModelLimits
from kontextd_models.preview import fit_projection
from kontextd_models.request import check
from kontextd_models.resolution import preferred_sizes
from PIL import Image, ImageDraw

Photo = Callable[[int, int], Image.Image]
EMBEDDED_LIMITS = ModelLimits(preferred_sizes(256**2), native_area=256**2, max_area=512**2, min_area=128**2)


def run(engine: Engine, request: EditRequest) -> Done:
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def pixels(done: Done) -> list[np.ndarray]:
    return [np.asarray(image) for image in done.images]


# What comes out.


def test_an_edit_yields_every_step_and_then_the_result(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    *steps, done = tiny_engine.edit(replace(tiny_request, num_images=2))
    assert isinstance(done, Done)
    assert [(step.index, step.total, step.image_index) for step in steps] == [
        (1, 6, 0), (2, 6, 0), (3, 6, 0), (4, 6, 1), (5, 6, 1), (6, 6, 1),
    ]  # fmt: skip
    elapsed = [step.elapsed_s for step in steps]
    assert elapsed == sorted(elapsed)
    assert elapsed[0] > 0
    assert [image.size for image in done.images] == [(64, 64)] * 2
    assert {image.mode for image in done.images} == {"RGB"}
    assert done.has_nsfw_concepts == (False, False)
    assert done.warnings == ()


def test_the_timings_name_every_stage_and_add_up_to_no_more_than_the_total(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    timings = dict(run(tiny_engine, tiny_request).timings)
    total = timings.pop("total")
    assert timings.keys() == {"encode_prompt", "encode_image", "merge", "denoise", "decode", "safety"}
    assert timings["merge"] == 0.0
    assert min(timings[stage] for stage in ("encode_prompt", "encode_image", "denoise", "decode")) > 0
    assert sum(timings.values()) <= total


def test_each_of_several_images_equals_the_single_edit_with_its_seed(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    together = run(tiny_engine, replace(tiny_request, num_images=4, seed=2**53 - 2))
    assert together.seeds == (2**53 - 2, 2**53 - 1, 0, 1)
    for seed, image in zip(together.seeds, pixels(together), strict=True):
        assert np.array_equal(image, pixels(run(tiny_engine, replace(tiny_request, seed=seed)))[0])
    assert not np.array_equal(pixels(together)[0], pixels(together)[1])


def test_a_seed_that_is_not_given_is_drawn_and_told(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    first, second = (run(tiny_engine, replace(tiny_request, seed=None)) for _ in range(2))
    assert first.seeds != second.seeds
    assert 0 <= first.seeds[0] < 2**53
    assert np.array_equal(pixels(first)[0], pixels(run(tiny_engine, replace(tiny_request, seed=first.seeds[0])))[0])


def test_a_prompt_longer_than_the_model_reads_is_cut_with_a_warning_that_does_not_quote_it(
    tiny_engine: Engine, tiny_request: EditRequest, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    done = run(tiny_engine, replace(tiny_request, prompt=prompt + "zebra"))
    tokenizer = tiny_engine.model.pipeline.tokenizer_2
    cut = len(tokenizer(prompt + "zebra", verbose=False).input_ids) - tokenizer.model_max_length
    assert [f"its last {cut} tokens" in warning for warning in done.warnings] == [True]
    assert done.warnings[0] in caplog.text
    assert not any(word in caplog.text for word in ("lazy", "zebra"))
    assert np.array_equal(pixels(done)[0], pixels(run(tiny_engine, replace(tiny_request, prompt=prompt + "yak")))[0])


def test_a_size_that_is_not_simply_the_input_is_logged_with_its_reason(
    tiny_engine: Engine, tiny_request: EditRequest, photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_engine, tiny_request)
    assert caplog.text == ""
    done = run(tiny_engine, replace(tiny_request, image=photo(500, 400)))
    assert "500x400" in caplog.text
    assert done.size.reason in caplog.text


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode_are_edited(
    tiny_engine: Engine, tiny_request: EditRequest, photo: Photo, mode: str
) -> None:
    image = Image.new("I;16", (64, 64), 999) if mode == "I;16" else photo(64, 64).convert(mode)
    assert run(tiny_engine, replace(tiny_request, image=image)).images[0].size == (64, 64)


# Previews and safety.


def test_previews_come_every_few_steps_and_change_nothing(
    tiny_engine: Engine, tiny_request: EditRequest, photo: Photo
) -> None:
    request = replace(tiny_request, num_inference_steps=5, num_images=2, image=photo(128, 64))
    *steps, done = tiny_engine.edit(replace(request, preview_interval=2))
    previews = {step.index: step.preview for step in steps if isinstance(step, Step) and step.preview is not None}
    assert list(previews) == [2, 4, 7, 9]
    assert {preview.size for preview in previews.values()} == {(128, 64)}
    assert np.asarray(previews[2]).std() > 0
    for image, expected in zip(pixels(done), pixels(run(tiny_engine, request)), strict=True):
        assert np.array_equal(image, expected)


def test_without_an_interval_there_are_no_previews(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    assert [event for event in tiny_engine.edit(tiny_request) if isinstance(event, Step) and event.preview] == []


def flagging(folder: Path, **settings: bool) -> Engine:
    """An engine whose checker flags whatever it is shown."""
    safety = SafetyConfig(threshold=0.0, **settings)
    return load_engine(EngineConfig(model=folder, device="cpu", safety=safety))


@pytest.mark.parametrize(
    ("asked", "forced", "black"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_a_flagged_image_is_black_unless_the_request_may_and_does_ask_for_no_check(
    tiny_folder: Path, tiny_request: EditRequest, asked: bool, forced: bool, black: bool
) -> None:
    request = replace(tiny_request, num_images=2, enable_safety_checker=asked)
    done = run(flagging(tiny_folder, forced=forced), request)
    assert done.has_nsfw_concepts == (black, black)
    assert [image.getbbox() is None for image in done.images] == [black, black]
    assert [image.size for image in done.images] == [(64, 64)] * 2
    assert [True for warning in done.warnings if "a request cannot switch that off" in warning] == [True] * forced


def test_an_image_that_is_not_flagged_passes_the_checker_unchanged(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    checked = run(tiny_engine, replace(tiny_request, enable_safety_checker=True))
    assert checked.has_nsfw_concepts == (False,)
    assert checked.timings["safety"] > 0
    assert np.array_equal(pixels(checked)[0], pixels(run(tiny_engine, tiny_request))[0])


def test_a_flagged_preview_is_never_seen(
    tiny_folder: Path, tiny_request: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontextd_models.safety.screen.TIME_LIMIT_S", 60.0)
    engine = flagging(tiny_folder)
    request = replace(tiny_request, num_inference_steps=50, preview_interval=1, enable_safety_checker=True)
    previews = []
    for event in engine.edit(request):
        if isinstance(event, Step):
            previews += [event.preview] if event.preview else []
            time.sleep(0 if len(previews) > 3 else 0.1)  # a slow consumer, whom checked previews do reach
    assert len(previews) > 3
    assert [preview.getbbox() for preview in previews] == [None] * len(previews)


def test_the_first_preview_of_an_engine_delays_no_step(
    tiny_engine: Engine, tiny_request: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    monkeypatch.setattr("kontextd_models.engine.fit_projection", lambda vae: fitted.append(1) or fit_projection(vae))
    edit = tiny_engine.edit(replace(tiny_request, preview_interval=3))
    assert next(edit).preview is None  # no preview was wanted yet
    assert len(fitted) == 1
    assert [step.preview is not None for step in edit if isinstance(step, Step)] == [False, True]
    assert run(tiny_engine, replace(tiny_request, preview_interval=1)).images
    assert len(fitted) == 1


def test_a_flagged_input_is_refused_where_inputs_are_checked_and_the_engine_works_on(
    tiny_folder: Path, tiny_request: EditRequest
) -> None:
    engine = flagging(tiny_folder, check_inputs=True)
    edit = engine.edit(replace(tiny_request, enable_safety_checker=True))
    with pytest.raises(ContentPolicyViolation):
        next(edit)
    assert run(engine, tiny_request).images


# Reference geometry.


def roundness(image: Image.Image) -> float:
    """Width over height of the dark disc in a light picture, from its second moments."""
    dark = 255.0 - np.asarray(image.convert("L"), dtype=np.float64)
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    weight = dark / dark.sum()
    spread_x = (weight * (x - (weight * x).sum()) ** 2).sum()
    spread_y = (weight * (y - (weight * y).sum()) ** 2).sum()
    return float(np.sqrt(spread_x / spread_y))


@pytest.mark.parametrize("limits", [ModelLimits(), EMBEDDED_LIMITS], ids=["kontext", "embedded"])
@pytest.mark.parametrize("mode", [ResolutionMode.R1_1, ResolutionMode.R9_16])
def test_a_circle_stays_round_in_the_reference_whatever_ratio_is_asked_for(
    limits: ModelLimits, mode: ResolutionMode
) -> None:
    image = Image.new("RGB", (1920, 1080), "white")
    ImageDraw.Draw(image).ellipse((700, 300, 1180, 780), fill="black")
    assert roundness(image) == pytest.approx(1, abs=1e-3)
    edit = check(EditRequest(image, "", resolution_mode=mode), limits)
    reference = prepare_reference(edit.image, edit.size.reference_width, edit.size.reference_height)
    assert roundness(reference) == pytest.approx(1, abs=0.02)
    squashed = prepare_reference(edit.image, edit.size.width, edit.size.height)
    assert roundness(squashed) != pytest.approx(1, abs=0.3)  # the measure sees what is to be avoided


# What is refused, at the call.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 51),
        ("num_inference_steps", 4.0),
        ("num_inference_steps", True),
        ("guidance_scale", -0.1),
        ("guidance_scale", 20.1),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", 10**400),
        ("guidance_scale", "2.5"),
        ("num_images", 0),
        ("num_images", 5),
        ("seed", -1),
        ("seed", 2**53),
        ("seed", 1.5),
        ("preview_interval", -1),
        ("prompt", None),
        ("prompt", b"make it red"),
        ("prompt", "\ud800"),
        ("image", b"PNG"),
        ("resolution_mode", "7:5"),
        ("acceleration", "warp"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_before_anything_runs(
    tiny_engine: Engine, tiny_request: EditRequest, field: str, value: object
) -> None:
    with pytest.raises(InvalidValue, match=field) as caught:
        tiny_engine.edit(replace(tiny_request, **{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize("value", [0, 20, 2])
def test_the_ends_of_the_guidance_range_are_allowed(
    tiny_engine: Engine, tiny_request: EditRequest, value: float
) -> None:
    assert run(tiny_engine, replace(tiny_request, guidance_scale=value)).images


def test_a_picture_beyond_the_limits_is_refused(tiny_engine: Engine, tiny_request: EditRequest, photo: Photo) -> None:
    with pytest.raises(ImageTooSmall):
        tiny_engine.edit(replace(tiny_request, image=photo(64, 15)))
    with pytest.raises(AspectRatioOutOfRange):
        tiny_engine.edit(replace(tiny_request, image=photo(330, 80)))
