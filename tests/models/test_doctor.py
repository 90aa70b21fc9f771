"""The doctor finds what is wrong, one thing at a time, on machines and models that are really like that."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from kontextd_models import EngineConfig, MemoryMode, SafetyConfig, doctor
from kontextd_models.checks import Check, as_json, failed
from kontextd_models.checksums import record
from kontextd_models.doctor import Patient, examine
from kontextd_models.folder import check_folder

CARD = {"name": "NVIDIA H100", "capability": "9.0", "free_bytes": 80 * 2**30, "total_bytes": 81 * 2**30}
NO_GPU = {"gpus": [], "cuda_build": "13.0", "network_attempts": []}
WITH_GPU = {**NO_GPU, "gpus": [CARD]}


def patient(folder: Path, **changes: object) -> Patient:
    return Patient(replace(EngineConfig(model=folder, device="cpu"), **changes), folder)


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture(scope="module")
def probed() -> tuple[Check, Mapping[str, object] | None]:
    """What torch sees of this machine, found out once: importing the engine in a new process takes seconds."""
    return doctor.check_torch()


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A driver's own program is not to be had here; this one stands in its place on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_sound_machine_and_model_pass(tmp_path: Path, probed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_torch", lambda: probed)
    folder = tiny.build(tmp_path / "model")
    record(folder)
    found = by_name(examine(patient(folder)))
    assert failed(found.values()) == []
    assert list(found) == ["disk", "torch", "gpu", "model", "memory", "offline", "safety", "hashes"]
    assert {name for name, check in found.items() if check.passed is None} <= {"gpu"}
    assert len(found["hashes"].figures["sha256"]) == found["hashes"].figures["known"] > 10
    json.dumps(as_json(found.values()))


def test_a_changed_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model")
    record(folder)
    (folder / "vae/config.json").write_text((folder / "vae/config.json").read_text() + " ")
    (folder / "tokenizer_2/tokenizer_config.json").rename(tmp_path / "away")
    check = doctor.check_hashes(replace(check_folder(tiny.build(tmp_path / "other")), path=folder))
    assert check.passed is False
    assert "vae/config.json differs, tokenizer_2/tokenizer_config.json is missing" in check.detail


def test_a_model_without_known_sums_is_hashed_and_told_how_to_record_them(tiny_folder: Path) -> None:
    check = doctor.check_hashes(check_folder(tiny_folder))
    assert check.passed is None
    assert "kontextd doctor --record" in check.detail
    assert "transformer/diffusion_pytorch_model.safetensors" in check.figures["sha256"]


def test_a_truncated_model_is_named_and_the_rest_is_still_looked_at(
    tmp_path: Path, probed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_torch", lambda: probed)
    folder = tiny.build(tmp_path / "model")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = by_name(examine(patient(folder)))
    assert [check.name for check in failed(found.values())] == ["model"]
    assert str(weights) in found["model"].detail
    assert "truncated" in found["model"].detail
    assert found["memory"].passed is None


def test_too_little_memory_fails_and_says_how_much_is_needed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 1000)
    check = doctor.check_memory(patient(tiny_folder), check_folder(tiny_folder), NO_GPU)
    assert check.passed is False
    assert "close other programs" in check.detail
    parameters = sum(doctor.parameters(check_folder(tiny_folder)).values())
    assert check.figures["needed_bytes"] == pytest.approx(4 * 1.15 * parameters, abs=1)


def test_memory_is_what_the_kernel_says_is_available() -> None:
    free = doctor.available_memory()
    assert free is not None
    assert 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_full_disk_and_a_read_only_folder_fail(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_disk(patient(tiny_folder)).passed is True
    with monkeypatch.context() as patched:
        patched.setattr(doctor.os, "access", lambda path, mode: False)  # root may write anywhere
        assert "cannot be written" in doctor.check_disk(patient(tiny_folder)).detail
    monkeypatch.setattr(doctor, "_DISK_NEEDED", 2**80)
    check = doctor.check_disk(patient(tiny_folder))
    assert check.passed is False
    assert "GiB free" in check.detail


def test_a_gpu_that_torch_does_not_see_is_a_failure_that_names_the_driver(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H100, 550.54.15, 81559, 81000'")
    check = doctor.check_gpu(patient(tiny_folder), NO_GPU)
    assert check.passed is False
    assert "550.54.15" in check.detail
    assert "580.65.06 or newer" in check.detail
    built_without = doctor.check_gpu(patient(tiny_folder), {**NO_GPU, "cuda_build": None})
    assert "built without CUDA" in built_without.detail


def test_a_gpu_that_torch_sees_passes_with_its_memory(tiny_folder: Path) -> None:
    check = doctor.check_gpu(patient(tiny_folder), WITH_GPU)
    assert (check.passed, check.detail) == (True, "NVIDIA H100 (80.0 GiB of 81.0 GiB free)")


def test_a_machine_without_a_gpu_is_fine_unless_one_is_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for device in ("cpu", "auto"):
        found = doctor.check_gpu(patient(tiny_folder, device=device), NO_GPU)
        assert (found.passed, found.detail) == (None, "no NVIDIA GPU: edits run on the CPU")
    asked = doctor.check_gpu(patient(tiny_folder, device="cuda:1"), NO_GPU)
    assert asked.passed is False
    assert "cuda:1" in asked.detail


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "version mismatch"),
        ("exit 9", "exit code 9"),
        ("exec sleep 60", "did not answer within 0.2 s"),
    ],
)
def test_a_driver_that_is_broken_is_not_taken_for_a_machine_without_a_gpu(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(doctor, "_SMI_TIMEOUT_S", 0.2)
    broken = doctor.check_gpu(patient(tiny_folder, device="auto"), NO_GPU)
    assert broken.passed is False
    assert said in broken.detail
    unwanted = doctor.check_gpu(patient(tiny_folder, device="cpu"), NO_GPU)
    assert (unwanted.passed, said in unwanted.detail) == (None, True)


def test_a_card_that_is_asked_for_and_not_there_fails(tiny_folder: Path) -> None:
    for device, passed in (("cuda", True), ("cuda:0", True), ("cuda:1", False)):
        check = doctor.check_gpu(patient(tiny_folder, device=device), WITH_GPU)
        assert check.passed is passed
    assert "the device is set to cuda:1 and torch sees 1" in check.detail


def test_a_small_card_wants_room_for_the_whole_model_in_host_memory(tiny_folder: Path) -> None:
    def needed(free_bytes: int, **changes: object) -> tuple[object, object]:
        report = {**WITH_GPU, "gpus": [{**CARD, "free_bytes": free_bytes}]}
        check = doctor.check_memory(patient(tiny_folder, **changes), check_folder(tiny_folder), report)
        return check.figures["memory_mode"], check.figures["needed_bytes"]

    sizes = doctor.parameters(check_folder(tiny_folder))
    whole = int(2 * sum(sizes.values()) * 1.15)
    assert needed(9 * 10**8, device="auto") == ("sequential", whole)
    assert needed(80 * 2**30, device="auto", memory_mode=MemoryMode.GROUP_OFFLOAD) == ("group_offload", whole)
    encoders = sizes["text_encoder"] + sizes["text_encoder_2"]
    assert needed(80 * 2**30, device="auto") == ("resident", int(2 * max(sizes["transformer"], encoders) * 1.15))
    assert needed(80 * 2**30, device="cpu") == ("resident", pytest.approx(2 * whole, abs=2))


def test_an_import_that_reaches_for_the_network_is_caught(tmp_path: Path) -> None:
    # A module of the same name as a dependency stands before it on the path, and looks a host up when it is imported.
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers/__init__.py").write_text(
        "import socket\ntry: socket.getaddrinfo('localhost', 1)\nexcept OSError: pass\n"
        "__path__ = []\nclass FluxKontextPipeline: pass\n"
    )
    code = (
        "import sys, types, json\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.modules['kontextd_models.engine'] = types.ModuleType('engine')\n"
        "from kontextd_models.probe import probe\n"
        "print(json.dumps(probe()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (attempt,) = json.loads(ran.stdout)["network_attempts"]
    assert "socket.getaddrinfo" in attempt
    assert "localhost" in attempt


def test_offline_fails_where_something_reached_out_or_a_switch_says_online(tiny_folder: Path) -> None:
    sound = doctor.check_offline(patient(tiny_folder), NO_GPU)
    assert sound.passed is True
    reached = doctor.check_offline(patient(tiny_folder), {**NO_GPU, "network_attempts": ["socket.connect x"]})
    assert reached.passed is False
    switched = Patient(EngineConfig(), tiny_folder, {"HF_HUB_OFFLINE": "0"})
    assert doctor.check_offline(switched, NO_GPU).passed is False
    assert doctor.check_offline(patient(tiny_folder), None).passed is None


def test_a_checker_that_is_not_there_fails(tiny_folder: Path) -> None:
    def check(*checkers: str) -> Check:
        return doctor.check_safety_model(patient(tiny_folder, safety=SafetyConfig(checkers=checkers)))

    assert check("embedded").passed is True
    assert "/nowhere is no checker's folder" in check("embedded", "/nowhere").detail
    assert check().passed is False


def test_damaged_weights_of_the_embedded_checker_fail(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = doctor.weights_file().read_bytes()
    damaged = tmp_path / "open-nsfw.onnx"
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(doctor, "weights_file", lambda: damaged)
    check = doctor.check_safety_model(patient(tiny_folder))
    assert check.passed is False
    assert "sha256" in check.detail


def test_an_engine_that_cannot_be_imported_is_reported_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    check, report = doctor.check_torch()
    assert (check.passed, report) == (False, None)
    assert "libcudart.so.13" in check.detail


def test_a_driver_that_hangs_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.01)
    check, report = doctor.check_torch()
    assert (check.passed, report) == (False, None)
    assert "took over" in check.detail
