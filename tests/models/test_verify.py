"""Each proof of `kontextd verify` passes on a sound engine and fails on one that is broken in that way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_models import EngineConfig, MemoryMode, SafetyConfig, denoise, load_engine
from kontextd_models.checks import as_json, failed
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import fingerprint, native_size, photo_at
from kontextd_models.safety import SafetyGate
from kontextd_models.verify import (
    Subject,
    check_alignment,
    check_loop,
    check_memory_mode,
    check_out_of_memory,
    check_repeat,
    check_restart,
    check_safety,
    checks,
    subject_of,
)
from PIL import Image


@pytest.fixture
def subject(tiny_folder: Path) -> Subject:
    return subject_of(EngineConfig(model=tiny_folder, device="cpu", safety=SafetyConfig(forced=True)))


@pytest.fixture
def engine(subject: Subject) -> Engine:
    return load_engine(subject.config)


def test_the_embedded_model_passes_every_proof_that_a_cpu_admits(embedded_folder: Path) -> None:
    found = list(checks(subject_of(EngineConfig(model=embedded_folder, device="cpu"))))
    assert failed(found) == []
    assert [check.name.split()[0] for check in found if check.passed] == [
        *("model", "loop", "loop", "loop", "alignment", "safety", "repeat", "restart", "memory")
    ]
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


def test_a_model_that_does_not_give_the_photo_back_fails_the_alignment(subject: Subject, engine: Engine) -> None:
    check = check_alignment(subject, engine)
    assert check.passed is False
    assert set(check.figures["ours_px"]) == set(check.figures["stock_px"]) == {"64x64", "80x48", "48x80"}


@pytest.mark.parametrize(("right", "aligned"), [(0, True), (1, False)])
def test_alignment_is_judged_at_half_a_pixel(
    subject: Subject, engine: Engine, monkeypatch: pytest.MonkeyPatch, right: int, aligned: bool
) -> None:
    def moved(model: object, latents: object, width: int, height: int) -> Image.Image:
        photo = photo_at((width, height))
        return photo.transform(photo.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, 0))

    monkeypatch.setattr("kontextd_models.engine.decode", moved)
    check = check_alignment(subject, engine)
    assert check.passed is aligned
    assert max(check.figures["ours_px"].values()) == pytest.approx(right, abs=0.3)


def test_caches_that_change_the_picture_are_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_repeat(engine).passed is True
    kept = engine.prompts.get
    monkeypatch.setattr(
        engine.prompts, "get", lambda key: (found := kept(key)) and replace(found, pooled=-found.pooled)
    )
    assert check_repeat(engine).passed is False


def test_a_restart_that_changes_the_picture_or_fails_is_found(subject: Subject, engine: Engine, tmp_path: Path) -> None:
    wanted = fingerprint(engine)
    assert check_restart(replace(subject, in_new_process=lambda config: wanted), wanted).passed is True
    assert check_restart(replace(subject, in_new_process=lambda config: "0" * 64), wanted).passed is False
    elsewhere = replace(subject, config=replace(subject.config, model=tmp_path / "nowhere"))
    gone = check_restart(elsewhere, wanted)
    assert gone.passed is False
    assert "is not a folder" in gone.detail


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
    assert [check.name for check in found if check.passed] == ["model", "safety", "repeat", "memory resident"]


def test_out_of_memory_is_proved_on_cuda_only_and_says_so(engine: Engine) -> None:
    check = check_out_of_memory(engine)
    assert check.passed is None
    assert "needs a CUDA device" in check.detail


def test_the_fingerprint_depends_on_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    import tiny

    other = tiny.build(tmp_path / "other", seed=1)
    digests = [fingerprint(load_engine(EngineConfig(model=folder, device="cpu"))) for folder in (tiny_folder, other)]
    assert digests[0] != digests[1]
