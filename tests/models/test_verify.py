"""Each proof of `kontextd verify` passes on a sound engine and fails on one that is broken in that way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from kontextd_models import Acceleration, EngineConfig, MemoryMode, ResolutionMode, SafetyConfig, denoise, load_engine
from kontextd_models.checks import Check, as_json, failed
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import fingerprint, native_size, photo_at
from kontextd_models.limits import ModelLimits
from kontextd_models.pictures import PICTURES, picture_at
from kontextd_models.resolution import plan
from kontextd_models.safety import SafetyGate
from kontextd_models.stock import StockEdit, snapped, stock_latents
from kontextd_models.verify import (
    Subject,
    check_loop,
    check_memory_mode,
    check_out_of_memory,
    check_repeat,
    check_restart,
    check_safety,
    checks,
    subject_of,
)
from kontextd_models.verify_alignment import check_alignment, sizes
from PIL import Image


@pytest.fixture
def subject(tiny_folder: Path) -> Subject:
    return subject_of(EngineConfig(model=tiny_folder, device="cpu", safety=SafetyConfig(forced=True)))


@pytest.fixture
def engine(subject: Subject) -> Engine:
    return load_engine(subject.config)


def test_the_embedded_model_passes_every_proof_that_a_cpu_admits(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontextd_models.verify_alignment._STEPS", 4)  # half of what the command takes
    found = list(checks(subject_of(EngineConfig(model=embedded_folder, device="cpu"))))
    assert failed(found) == []
    assert [check.name.split()[0] for check in found if check.passed] == [
        *("model", "loop", "loop", "loop", "alignment", "LoRA", "LoRA", "safety", "repeat", "restart", "memory")
    ]
    (alignment,) = [check for check in found if check.name == "alignment"]
    assert len(alignment.figures["ours_px"]) == 12
    # What our reference geometry is for: the stock pipeline stretches what is not one of its sizes already.
    assert max(alignment.figures["stock_px"].values()) > 1
    json.dumps(as_json(found))


def test_only_one_model_is_loaded_at_any_time(tiny_folder: Path) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []

    def load(config: EngineConfig) -> Engine:
        gc.collect()
        assert [model for model in alive if model() is not None] == []
        engine = load_engine(config)
        alive.append(weakref.ref(engine.model.pipeline))
        return engine

    plain = Subject(EngineConfig(model=tiny_folder, device="cpu"), load=load, knows_identity=False)
    assert failed(checks(plain)) == []
    assert len(alive) == 2


@pytest.mark.parametrize("aspect", [1.0, 1.6, 0.6])
def test_a_sound_loop_is_bit_identical_and_a_shifted_one_is_not(
    engine: Engine, aspect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = native_size(engine, aspect)
    assert check_loop(engine, size).passed is True
    # A millionth of the time shift is enough to be seen.
    monkeypatch.setattr(denoise, "shift", lambda *anchors, exact=denoise.shift: exact(*anchors) * (1 + 1e-6))
    broken = check_loop(engine, size)
    assert broken.passed is False
    assert "latents differ by up to" in broken.detail


def test_an_engine_whose_picture_is_not_its_loops_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontextd_models.engine.decode", lambda *_: Image.new("RGB", native_size(engine, 1.0), "grey"))
    check = check_loop(engine, native_size(engine, 1.0))
    assert check.passed is False
    assert "is not what the stock pipeline's latents decode to" in check.detail


def give_back(engine: Engine, monkeypatch: pytest.MonkeyPatch, moved_px: Mapping[str, int]) -> Check:
    """The check on an engine that gives every picture back as it was, those named moved to the right."""
    asked = [(name, size) for size in sizes(engine.model.limits) for name in PICTURES]
    results = iter(
        picture_at(*of).transform(of[1], Image.Transform.AFFINE, (1, 0, -moved_px.get(of[0], 0), 0, 1, 0))
        for of in asked
    )
    monkeypatch.setattr("kontextd_models.engine.decode", lambda *_: next(results))
    monkeypatch.setattr("kontextd_models.verify_alignment._STEPS", 1)
    return check_alignment(engine)


def test_a_model_that_does_not_give_pictures_back_fails_the_alignment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontextd_models.verify_alignment._STEPS", 2)
    check = check_alignment(engine)
    assert check.passed is False
    assert list(check.figures["stock_px"]) == ["chelsea 64x64", "chelsea 80x48", "chelsea 48x64"]
    assert check.figures["worst"] in check.figures["ours_px"]
    assert f"({check.figures['worst']}) at most" in check.detail


@pytest.mark.parametrize(("right", "aligned"), [(0, True), (1, False)])
def test_alignment_is_judged_at_half_a_pixel(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, right: int, aligned: bool
) -> None:
    check = give_back(engine, monkeypatch, dict.fromkeys(PICTURES, right))
    assert check.passed is aligned
    assert list(check.figures["ours_px"].values()) == [pytest.approx(right, abs=0.3)] * 12


def test_one_picture_that_moves_fails_the_alignment_and_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = give_back(engine, monkeypatch, {"rocket": 1})
    assert check.passed is False
    assert check.figures["worst"].startswith("rocket ")


def test_a_picture_that_comes_back_black_fails_the_alignment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontextd_models.verify_alignment._STEPS", 1)
    monkeypatch.setattr("kontextd_models.engine.decode", lambda _, __, width, height: Image.new("RGB", (width, height)))
    check = check_alignment(engine)
    assert (check.passed, set(check.figures["ours_px"].values())) == (False, {None})
    assert "moved by no measurable distance (chelsea 64x64)" in check.detail


def test_the_stretched_reference_is_diffusers_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    own_sizes = engine.model.limits.preferred_sizes
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", own_sizes)
    for size in ((64, 64), (96, 48), (48, 64)):
        photo = photo_at(size)
        edit = StockEdit(photo, "x", *size, steps=1, guidance_scale=2.5, seed=1)
        theirs = stock_latents(engine.model, replace(edit, snap_reference=True))
        assert torch.equal(stock_latents(engine.model, replace(edit, reference=snapped(photo, own_sizes))), theirs)
        assert torch.equal(stock_latents(engine.model, edit), theirs) == (size in own_sizes)


@pytest.mark.parametrize("limits", [ModelLimits(), ModelLimits(max_area=512 * 512)])
def test_alignment_is_measured_at_three_aspects_that_no_edit_has_to_scale(limits: ModelLimits) -> None:
    found = sizes(limits)
    assert len({round(width / height, 1) for width, height in found}) == 3
    for width, height in found:
        planned = plan(ResolutionMode.MATCH_INPUT, width, height, limits)
        assert (planned.width, planned.height, planned.reason) == (width, height, "")


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (1360, 768)])
def test_every_picture_is_cut_to_any_size_and_has_something_to_align(size: tuple[int, int]) -> None:
    pixels = [np.asarray(picture_at(name, size)).astype(float) for name in PICTURES]
    assert {array.shape for array in pixels} == {(size[1], size[0], 3)}
    assert min(array.std() for array in pixels) > 20
    assert max(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in combinations(pixels, 2)) < 0.7


def test_caches_that_change_the_picture_are_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_repeat(engine).passed is True
    kept = engine.prompts.get
    monkeypatch.setattr(
        engine.prompts, "get", lambda key: (found := kept(key)) and replace(found, pooled=-found.pooled)
    )
    assert check_repeat(engine).passed is False


def test_a_restart_that_changes_the_picture_or_fails_is_found(subject: Subject, engine: Engine) -> None:
    wanted = fingerprint(engine)
    assert check_restart(replace(subject, in_new_process=lambda config: wanted), wanted).passed is True
    assert check_restart(replace(subject, in_new_process=lambda config: "0" * 64), wanted).passed is False

    def failing(_: EngineConfig) -> str:
        words = "print('loading'); raise SystemExit('/nowhere is not a folder.')"
        return subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout

    gone = check_restart(replace(subject, in_new_process=failing), wanted)
    assert (gone.passed, gone.detail) == (False, "the second process failed: /nowhere is not a folder.")


def test_a_ceiling_below_the_preferred_sizes_fails_no_proof(embedded_folder: Path) -> None:
    """Another process makes its picture under the same ceiling."""
    ours = subject_of(EngineConfig(model=embedded_folder, device="cpu", max_area=40_000))
    engine = load_engine(ours.config)
    width, height = native_size(engine, 1.5)
    assert width * height <= 40_000
    assert check_loop(engine, (width, height)).passed is True
    assert check_restart(ours, fingerprint(engine)).passed is True


def test_what_engines_have_left_is_forgotten_before_a_mode_is_tried(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr("kontextd_models.memory.forget", lambda: done.append("forgotten"))

    def load(config: EngineConfig) -> Engine:
        done.append("loaded")
        return load_engine(config)

    check_memory_mode(replace(subject, load=load), MemoryMode.RESIDENT, "", is_cuda=False)
    assert done == ["forgotten", "loaded"]


def test_a_memory_mode_that_changes_the_picture_is_found(subject: Subject, engine: Engine) -> None:
    wanted = fingerprint(engine)
    assert check_memory_mode(subject, MemoryMode.RESIDENT, wanted, is_cuda=False).passed is True
    assert check_memory_mode(subject, MemoryMode.RESIDENT, "0" * 64, is_cuda=False).passed is False
    assert check_memory_mode(subject, MemoryMode.SEQUENTIAL, wanted, is_cuda=False).passed is None


def test_a_memory_mode_that_does_not_fit_is_not_tried(subject: Subject) -> None:
    huge = replace(subject, needs={MemoryMode.RESIDENT: 10**15})
    check = check_memory_mode(huge, MemoryMode.RESIDENT, "", is_cuda=True)
    assert check.passed is None
    assert "needs 1000000.0 GB" in check.detail


def test_what_a_mode_needs_counts_the_operators_own_ceiling(tiny_folder: Path) -> None:
    plain, raised = (subject_of(EngineConfig(model=tiny_folder, device="cpu", max_area=area)) for area in (None, 2**20))
    assert all(raised.needs[mode] > plain.needs[mode] for mode in plain.needs)


def test_a_table_whose_none_rounds_otherwise_does_not_fail_the_proof_of_the_loop(
    tiny_folder: Path, tmp_path: Path
) -> None:
    rows = {name: {} for name in ("none", "regular", "high")} | {"none": {"trim_last_block": True}}
    table = tmp_path / "presets.json"
    table.write_text(json.dumps({"presets": rows}))
    config = EngineConfig(model=tiny_folder, device="cpu", presets=table)
    assert load_engine(config).presets.rows[Acceleration.NONE].trim_last_block
    assert check_loop(load_engine(subject_of(config).config), (64, 64)).passed is True


def test_a_safety_checker_that_lets_everything_through_is_found(
    subject: Subject, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_safety(subject, engine).passed is True
    monkeypatch.setattr(SafetyGate, "flags", lambda self, images, time_limit_s=None: (False,) * len(images))
    assert check_safety(subject, engine).passed is False
    monkeypatch.setattr(SafetyGate, "flags", lambda self, images, time_limit_s=None: (True,) * len(images))
    assert check_safety(subject, engine).passed is False


def test_a_proof_that_breaks_has_failed_and_the_others_go_on(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr("kontextd_models.verify.stock_latents", broken)
    found = list(checks(replace(subject, in_new_process=broken, knows_identity=False)))
    assert [check.name for check in failed(found)] == ["loop 64x64", "loop 80x48", "loop 48x80", "restart"]
    assert found[1].detail == "broke with RuntimeError: CUDA error: an illegal memory access"
    assert [check.name for check in found if check.passed] == [
        *("model", "LoRA merge", "LoRA restored", "safety", "repeat", "memory resident")
    ]


def test_out_of_memory_is_proved_on_cuda_only_and_says_so(engine: Engine) -> None:
    check = check_out_of_memory(engine)
    assert check.passed is None
    assert "needs a CUDA device" in check.detail


def test_the_fingerprint_depends_on_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    import tiny

    other = tiny.build(tmp_path / "other", seed=1)
    digests = [fingerprint(load_engine(EngineConfig(model=folder, device="cpu"))) for folder in (tiny_folder, other)]
    assert digests[0] != digests[1]
