"""What a model's files are, and what they should be, from each of the three places that say so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from kontextd_models.checksums import expected, model_files, record, sha256_of
from kontextd_models.errors import ModelError

CONTENT = b"weights" * 1000
SUM = hashlib.sha256(CONTENT).hexdigest()
NAME = "vae/model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    (tmp_path / NAME).write_bytes(CONTENT)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    return tmp_path


def test_a_sum_is_the_sha256_of_the_file(folder: Path) -> None:
    assert sha256_of(folder / NAME) == SUM


def test_only_the_parts_of_the_model_count_and_not_what_else_a_repository_holds(folder: Path) -> None:
    for other in ("README.md", "flux1-kontext-dev.safetensors", "onnx/a.onnx", "vae/.cache/lock", ".cache/x"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"x")
    assert [path.as_posix() for path in model_files(folder)] == ["model_index.json", NAME]


def test_recorded_sums_are_read_back(folder: Path) -> None:
    assert expected(folder) == {}
    assert record(folder) == expected(folder)
    assert expected(folder)[NAME] == SUM


def test_sums_of_a_hub_download_are_read_from_its_records(folder: Path) -> None:
    for name, etag in ((NAME, SUM), ("model_index.json", "11c5a3d5811f50298f278a704980280950aedb10")):
        path = folder / f".cache/huggingface/download/{name}.metadata"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"commit\n{etag}\n1712656091.123\n")
    assert expected(folder) == {NAME: SUM}  # the other ETag is git's own, no SHA-256


def test_sums_in_the_hub_cache_are_the_names_of_the_blobs(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / NAME).rename(folder / "blobs" / SUM)
    (folder / NAME).symlink_to(Path("../blobs") / SUM)
    assert expected(folder) == {NAME: SUM}


def test_a_file_that_the_manifest_names_is_expected_even_where_it_is_gone(folder: Path) -> None:
    record(folder)
    (folder / NAME).unlink()
    assert expected(folder)[NAME] == SUM


@pytest.mark.parametrize("text", ["{", "[]", '{"vae/config.json": "abc"}', '{"vae/config.json": 5}'])
def test_a_broken_manifest_is_named(folder: Path, text: str) -> None:
    (folder / "checksums.json").write_text(text)
    with pytest.raises(ModelError, match=r"checksums\.json"):
        expected(folder)
