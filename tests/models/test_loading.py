"""Loading: what a model folder must hold, which message names what it lacks, and that nothing is fetched or run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models import Done, EditRequest, EngineConfig, SafetyConfig, load_engine
from kontextd_models.errors import InvalidValue, ModelError, OutOfMemory
from kontextd_models.folder import check_folder, read_card
from kontextd_models.limits import ModelLimits
from kontextd_models.weight_files import read_header
from PIL import Image
from safetensors.torch import load_file, save_file

Photo = Callable[[int, int], Image.Image]
WEIGHTS = (
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "vae/config.json",
)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.build(tmp_path / "sharded", max_shard_size="100KB")


def load(folder: Path, **settings: object) -> object:
    return load_engine(EngineConfig(model=folder, device="cpu", **settings))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# A whole folder.


def test_a_whole_folder_loads_in_float32_on_the_cpu(folder: Path) -> None:
    model = load_engine(EngineConfig(model=folder, device="cpu")).model
    parts = [model.pipeline.transformer, model.pipeline.vae, model.pipeline.text_encoder, model.pipeline.text_encoder_2]
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert {weight.requires_grad for part in parts for weight in part.parameters()} == {False}
    assert {part.training for part in parts} == {False}


def test_weights_kept_in_half_precision_run_in_the_dtype_that_is_asked_for(folder: Path, photo: Photo) -> None:
    for name in WEIGHTS:
        halved = {key: value.half() for key, value in load_file(folder / name).items()}
        save_file(halved, folder / name, metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        engine = load_engine(EngineConfig(model=folder, device="cpu", dtype=str(dtype).removeprefix("torch.")))
        assert {weight.dtype for weight in engine.model.pipeline.transformer.parameters()} == {dtype}
        *_, done = engine.edit(EditRequest(photo(64, 64), "", 1, enable_safety_checker=False))
        assert isinstance(done, Done)


def test_sharded_weights_load_to_the_same_bits(sharded: Path, folder: Path) -> None:
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    many, one = (load_engine(EngineConfig(model=path, device="cpu")).model.pipeline for path in (sharded, folder))
    ours, theirs = many.transformer.state_dict(), one.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loading_opens_no_connection_changes_no_environment_and_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    attempts = []

    def refuse(*address: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = dict(os.environ)
    load(folder)
    assert (attempts, dict(os.environ) == before) == ([], True)
    assert capfd.readouterr() == ("", "")


def test_the_folder_is_checked_without_importing_torch() -> None:
    code = "import sys, kontextd_models.folder; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_python_files_in_a_model_folder_are_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('')\n"
    for name in ("pipeline.py", "transformer/pipeline.py", "transformer/modeling.py", "tokenizer/tokenization.py"):
        (folder / name).write_text(code)
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.T", None]})
    load(folder)
    assert not marker.exists()


# What is missing.


@pytest.mark.parametrize("name", CONFIGS + WEIGHTS)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "transformer", "vae"])
def test_a_missing_part_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(folder)


@pytest.mark.parametrize(("name", "wanted"), [("tokenizer", "vocab.json"), ("tokenizer_2", "spiece.model")])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, name: str, wanted: str) -> None:
    (folder / name / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=wanted):
        load(folder)


def test_a_folder_that_is_none_is_refused(folder: Path) -> None:
    for path in (folder / "absent", folder / "model_index.json"):
        with pytest.raises(ModelError, match=path.name):
            load(path)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=gone) as caught:
        load(sharded)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize("weight_map", [{"x": "../../etc/passwd"}, {"x": "shard.bin"}, {"x": 3}, ["x"], None])
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, weight_map: object) -> None:
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    change(index, weight_map=weight_map)
    with pytest.raises(ModelError, match=index.name):
        load(sharded)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_tensor_that_is_in_no_file_is_named_instead_of_made_up(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    gone = sorted(name for name in tensors if "shared" not in name)[-1]
    del tensors[gone]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.split("/")[0]) as caught:
        load(folder)
    assert gone.split(".")[-2] in str(caught.value)


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / WEIGHTS[2]).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin .*never read.*Convert"):
        load(folder)


# What is broken.


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("cut", [1, 1000, 60_000])
def test_a_truncated_file_is_named(folder: Path, name: str, cut: int) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=rf"{name} is truncated"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (b"<!DOCTYPE html><html>not found</html>", "truncated, or no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (struct.pack("<Q", 2) + b"[]", "makes no sense"),
        (struct.pack("<Q", 4) + b"null", "makes no sense"),
        (struct.pack("<Q", 9) + b'{"a": 1} ', "makes no sense"),
        (struct.pack("<Q", 99_999) + b"[" * 99_999, "makes no sense"),
    ],
    ids=["empty", "seven bytes", "html", "lfs pointer", "list", "null", "entry", "deep"],
)
def test_a_file_that_holds_no_weights_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / WEIGHTS[3]).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert WEIGHTS[3] in str(caught.value)


def with_header(file: Path, tensors: dict[str, object], data: bytes) -> Path:
    header = json.dumps(tensors).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "makes no sense"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "makes no sense"),
        ({"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}, "makes no sense"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "makes no sense"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "makes no sense"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begins at byte 4"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: dict[str, object], message: str) -> None:
    file = with_header(tmp_path / "x.safetensors", {"a": entry}, bytes(8))
    with pytest.raises(ModelError, match=message):
        read_header(file)


def test_overlapping_tensors_and_bytes_too_many_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    file = tmp_path / "x.safetensors"
    assert read_header(with_header(file, {"a": entry}, bytes(8)))["a"].shape == (2,)
    with pytest.raises(ModelError, match="begins at byte 0"):
        read_header(with_header(file, {"a": entry, "b": entry}, bytes(8)))
    with pytest.raises(ModelError, match="longer than its header says"):
        read_header(with_header(file, {"a": entry}, bytes(9)))


@given(st.binary(max_size=200))
def test_no_bytes_make_the_header_check_fail_in_any_other_way(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    for data in (content, struct.pack("<Q", len(content)) + content):
        file.write_bytes(data)
        with contextlib.suppress(ModelError):
            read_header(file)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_configuration_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load(folder)


# Another architecture.


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "FluxPipeline"},
        {"_class_name": ["pipeline", "FluxKontextPipeline"]},
        {"transformer": ["diffusers", "SD3Transformer2DModel"]},
        {"transformer": ["modeling", "FluxTransformer2DModel"]},
        {"transformer": [None, None]},
        {"vae": "AutoencoderKL"},
        {"tokenizer_2": ["transformers", ["T5Tokenizer"]]},
    ],
)
def test_another_pipeline_is_refused_by_its_index(folder: Path, values: dict[str, object]) -> None:
    change(folder / "model_index.json", **values)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}),
        ("transformer/config.json", {"in_channels": 384}),
        ("transformer/config.json", {"joint_attention_dim": 64}),
        ("transformer/config.json", {"pooled_projection_dim": 64}),
        ("transformer/config.json", {"num_attention_heads": "2"}),
        ("text_encoder/config.json", {"model_type": "bert"}),
        ("text_encoder_2/config.json", {"model_type": "umt5"}),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
        ("vae/config.json", {"block_out_channels": [8, 8, 8]}),
        ("vae/config.json", {"block_out_channels": []}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}),
    ],
)
def test_a_part_of_another_architecture_is_named(folder: Path, name: str, values: dict[str, object]) -> None:
    change(folder / name, **values)
    with pytest.raises(ModelError, match=name):
        load(folder)


def test_weights_of_another_shape_are_named_by_their_part(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS[2])
    tensors["x_embedder.weight"] = torch.zeros(16, 64)
    save_file(tensors, folder / WEIGHTS[2], metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"transformer cannot be loaded.*x_embedder"):
        load(folder)


# The card, and the operator's settings.


def test_without_a_card_a_model_has_the_limits_of_kontext_and_the_name_of_its_folder(folder: Path) -> None:
    (folder / "kontextd.json").unlink()
    card = check_folder(folder).card
    assert (card.name, card.demonstration, card.instructions, card.limits) == ("model", False, (), ModelLimits())


def test_a_card_says_what_the_model_is_and_knows(folder: Path) -> None:
    change(folder / "kontextd.json", demonstration=True, instructions=["blur"], identity_prompt="keep it")
    card = read_card(folder)
    assert (card.name, card.demonstration, card.instructions) == ("tiny random model", True, ("blur",))
    assert (card.identity_prompt, card.limits.max_area) == ("keep it", 128 * 128)


@pytest.mark.parametrize(
    "values",
    [
        {"name": 3},
        {"demonstration": "yes"},
        {"instructions": "blur"},
        {"instructions": [1]},
        {"identity_prompt": None},
        {"limits": []},
        {"limits": {"max_area": "big"}},
        {"limits": {"max_sides": 3}},
        {"limits": {"grid": 32, "preferred_sizes": [[64, 64]]}},
        {"colour": "red"},
    ],
)
def test_a_card_that_is_wrong_is_refused_by_name(folder: Path, values: dict[str, object]) -> None:
    change(folder / "kontextd.json", **values)
    with pytest.raises(ModelError, match=r"kontextd\.json|vae/config\.json"):
        load(folder)


def test_an_operator_s_ceiling_is_the_limit_of_the_engine(folder: Path, photo: Photo) -> None:
    engine = load_engine(EngineConfig(model=folder, device="cpu", max_area=64 * 64))
    *_, done = engine.edit(EditRequest(photo(128, 128), "", 1, enable_safety_checker=False))
    assert isinstance(done, Done)
    assert done.images[0].size == (64, 64)


def test_a_real_model_that_silently_lands_on_the_cpu_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_engine(EngineConfig(model=folder, device="cpu"))  # as asked
    demonstration = shutil.copytree(folder, tmp_path / "demonstration")
    card = json.loads((folder / "kontextd.json").read_text()) | {"demonstration": True}
    (demonstration / "kontextd.json").write_text(json.dumps(card))
    load_engine(EngineConfig(model=demonstration))
    assert [record for record in caplog.records if "sees no GPU" in record.message] == []
    load_engine(EngineConfig(model=folder))
    assert [record.levelname for record in caplog.records if "sees no GPU" in record.message] == ["WARNING"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_area", 0),
        ("max_area", 1000),
        ("dtype", "float16"),
        ("dtype", "int8"),
        ("device", "cuda:99"),
        ("device", "tpu"),
        ("device", "meta"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=str(value)) as caught:
        load_engine(EngineConfig(**{"model": folder, "device": "cpu", field: value}))
    assert caught.value.field == field


def test_a_safety_checker_that_cannot_be_loaded_is_refused_before_the_model_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr("kontextd_models.engine.load_model", loaded.append)
    with pytest.raises(ModelError, match=r"nowhere/config\.json is missing"):
        load(folder, safety=SafetyConfig(checkers=(str(tmp_path / "nowhere"),)))
    assert loaded == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_host_memory_is_not_taken_for_a_damaged_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", exhausted)
    with pytest.raises(OutOfMemory, match="while the model was loaded"):
        load(folder)
    monkeypatch.setattr("kontextd_models.engine.SafetyGate", exhausted)
    with pytest.raises(OutOfMemory, match="while the model was loaded"):
        load(folder)
