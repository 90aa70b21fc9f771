"""The version says when the same seed and prompt may give another picture, and costs a hash only once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kontextd_server.worker.version import model_version, weights_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model/vae").mkdir(parents=True)
    (tmp_path / "model/vae/weights.safetensors").write_bytes(b"weights")
    (tmp_path / "model/model_index.json").write_text("{}")
    return tmp_path / "model"


def test_other_weights_another_device_or_other_presets_are_another_version(folder: Path) -> None:
    first = weights_hash(folder)
    assert weights_hash(folder) == first
    (folder / "vae/weights.safetensors").write_bytes(b"others!")
    second = weights_hash(folder)
    tables = ({}, {"high": {"computed": 0.5}})
    versions = {
        model_version(weights, device, presets)
        for weights in (first, second)
        for device in ("cpu", "H100")
        for presets in tables
    }
    assert len(versions) == 8


def test_a_model_has_the_same_hash_wherever_it_lies(folder: Path) -> None:
    assert weights_hash(folder) == weights_hash(folder.rename(folder.with_name("elsewhere")))


def test_files_that_did_not_change_are_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, weights = tmp_path / "data/sums.json", folder / "vae/weights.safetensors"
    first = weights_hash(folder, sums)
    read: list[Path] = []
    monkeypatch.setattr("kontextd_server.worker.version.sha256_of", lambda path: read.append(path) or "0" * 64)
    assert weights_hash(folder, sums) == first
    assert read == []
    os.utime(weights, ns=(1, 1))
    assert weights_hash(folder, sums) != first
    assert read == [weights]


def test_sums_that_cannot_be_read_are_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = weights_hash(folder)
    sums = tmp_path / "sums.json"
    sums.write_bytes(b"\xff no JSON")
    assert weights_hash(folder, sums) == first
    assert "hashed again" in caplog.text
    assert weights_hash(folder, tmp_path / "sums.json" / "not a folder") == first
