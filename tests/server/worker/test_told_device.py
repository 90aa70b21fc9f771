"""What a worker says of its device: what computes, in which numbers, and what was asked for and cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from kontextd_models import EngineConfig
from kontextd_models.execution.blocks import NATIVE_WAY, Blocks, Way
from kontextd_server.worker.loaded import LoadedEngine, load_kontext, warm_up


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> LoadedEngine:
    return load_kontext(EngineConfig(model=tiny_folder, device="cpu"))


def test_a_fallback_is_told_and_is_no_other_version(tiny_folder: Path, plain: LoadedEngine) -> None:
    loaded = load_kontext(EngineConfig(model=tiny_folder, device="cpu", attention="cudnn"))
    assert loaded.told_device == (
        "cpu, float32; attention cudnn was asked for, and on the CPU there is only torch's own: native."
    )
    assert loaded.version == plain.version


def test_a_fallback_in_the_midst_of_an_edit_is_told_too(tiny_folder: Path) -> None:
    loaded = load_kontext(EngineConfig(model=tiny_folder, device="cpu"))

    def fail(*_: object) -> NoReturn:
        raise RuntimeError("of the test")

    broken = Blocks((Way("broken", fail, fail, fail), NATIVE_WAY))
    loaded.engine.model = replace(loaded.engine.model, blocks=broken)
    warm_up(loaded)
    assert "blocks that run broken failed (RuntimeError: of the test)" in loaded.told_device


def test_other_numbers_are_another_version(tiny_folder: Path, plain: LoadedEngine) -> None:
    loaded = load_kontext(EngineConfig(model=tiny_folder, device="cpu", precision="fp8"))
    assert loaded.told_device.startswith("cpu, float32, fp8 blocks; fp8 on the CPU is ")
    assert plain.told_device == "cpu, float32"
    assert loaded.version != plain.version
