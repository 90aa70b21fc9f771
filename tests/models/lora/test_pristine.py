"""Where pristine weights lie, and that each place gives back the loaded bits."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hand_made import CPU, style
from kontextd_models.loading import load_pipeline
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merging import Merger, open_merger
from kontextd_models.lora.pristine import Copies, Place, Room, choose, keep_pristine, parameters_of, size_of
from kontextd_models.records import MemoryMode
from safetensors.torch import load_file, save_file

GB = 10**9
EMBEDDING = Parameter(Component.T5, "shared.weight")


def bits(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def all_bits(pipeline: object) -> dict[Parameter, bytes]:
    return {at: bits(value) for at, value in parameters_of(pipeline).items()}


def spoil(pipeline: object) -> None:
    with torch.no_grad():
        for value in parameters_of(pipeline).values():
            value.mul_(3).add_(1)


def assert_kept(folder: Path, dtype: torch.dtype, place: Place) -> None:
    """Asked for before the first write, every weight is what was loaded then and ever after."""
    pipeline = load_pipeline(folder, dtype)
    loaded, pristine = all_bits(pipeline), keep_pristine(pipeline, folder, place, CPU)
    for _ in range(2):
        for at, value in parameters_of(pipeline).items():
            weight = pristine.weight(at)
            assert weight.dtype == value.dtype
            assert weight.data_ptr() != value.data_ptr()
            assert bits(weight) == loaded[at], at.name
        spoil(pipeline)


# The choice.


@pytest.mark.parametrize(
    ("device_gb", "host_gb", "place"),
    [(40, 100, Place.DEVICE), (33, 0, Place.DEVICE), (32, 33, Place.HOST), (0, 32, Place.FILES)],
)
def test_on_a_gpu_the_fastest_place_with_room_is_taken(device_gb: int, host_gb: int, place: Place) -> None:
    chosen, reason = choose(33 * GB, Room(device_gb * GB, host_gb * GB), is_cuda=True)
    assert chosen is place
    assert f"{device_gb}.0 GB to spare on the device and {host_gb}.0 GB in host memory" in reason


def test_on_the_cpu_the_files_are_taken_however_much_room_there_is() -> None:
    assert choose(1, Room(0, 100 * GB), is_cuda=False)[0] is Place.FILES


def test_on_the_cpu_no_device_has_room_and_the_host_keeps_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontextd_models.lora.pristine.available_memory", lambda: 100 * GB)
    assert Room.beside_model(CPU) == Room(0, 80 * GB)
    monkeypatch.setattr("kontextd_models.lora.pristine.available_memory", lambda: None)
    assert Room.beside_model(CPU) == Room(0, 0)


def test_the_choice_is_logged_with_its_reason(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = load_pipeline(tiny_folder, torch.float32)
    with caplog.at_level(logging.INFO, logger="kontextd_models"):
        merger = open_merger(pipeline, tiny_folder, CPU, MemoryMode.RESIDENT)
    assert merger.spare_device_bytes == 0
    assert f"({size_of(parameters_of(pipeline)) / 1e9:.1f} GB) for LoRAs: files, on the CPU" in caplog.text


# The bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", Place)
def test_every_place_gives_the_loaded_bits_before_and_after_the_weights_are_written(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, place: Place, dtype: torch.dtype
) -> None:
    assert_kept(tiny_folder, dtype, place)
    assert caplog.text == ""  # no weight was missed in the files


def test_the_embedded_model_s_half_precision_files_are_mapped_for_a_float32_model(
    embedded_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert_kept(embedded_folder, torch.float32, Place.FILES)
    assert caplog.text == ""


def test_shards_are_mapped_and_other_variants_beside_them_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.build(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    half = {name: value.half() for name, value in load_file(next((folder / "transformer").glob("*-of-*"))).items()}
    save_file(half, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert_kept(folder, torch.float32, Place.FILES)
    assert caplog.text == ""


Names = dict[str, tuple[str, ...]]


def renamed(folder: Path, to: Path, part: str, rename: Names | str) -> Path:
    """The model with some tensors of a part under other names, or all of them with a prefix."""
    shutil.copytree(folder, to)
    file = to / part / "model.safetensors"
    tensors = load_file(file)
    names = {name: (rename + name,) for name in tensors} if isinstance(rename, str) else rename
    changed = {new: value.clone() for name, value in tensors.items() for new in names.get(name, (name,))}
    save_file(changed, file, metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("part", "rename"),
    [
        ("text_encoder", "text_model."),  # as in FLUX.1's own folder
        ("text_encoder_2", {"shared.weight": ("shared.weight", "encoder.embed_tokens.weight")}),
        ("text_encoder_2", {"shared.weight": ("encoder.embed_tokens.weight",)}),
    ],
    ids=["CLIP with a prefix", "T5's embedding twice", "T5's embedding under its other name"],
)
def test_names_that_the_loaders_translate_are_found_in_the_files(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, rename: Names | str
) -> None:
    assert_kept(renamed(tiny_folder, tmp_path / "model", part, rename), torch.bfloat16, Place.FILES)
    assert caplog.text == ""


def test_what_the_files_do_not_hold_as_it_was_loaded_is_copied_and_told(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    pipeline = load_pipeline(folder, torch.float32)
    pipeline.text_encoder_2.shared.weight.data[0] = 0.0
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    other, gone = "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"
    tensors[other] = tensors[other] + 1
    del tensors[gone]
    tensors["shared.weight"][0] = -0.0  # equal to 0, and not the same bits
    save_file(tensors, tmp_path / "new.safetensors", metadata={"format": "pt"})
    (tmp_path / "new.safetensors").replace(file)
    loaded, pristine = all_bits(pipeline), keep_pristine(pipeline, folder, Place.FILES, CPU)
    for _ in range(2):
        assert {at for at in loaded if bits(pristine.weight(at)) != loaded[at]} == set()
        spoil(pipeline)
    told = [record.message.split()[0] for record in caplog.records]
    assert sorted(told) == sorted([other, gone, EMBEDDING.name])


def test_a_model_without_files_is_copied(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(tiny_folder, torch.float32)
    loaded, pristine = all_bits(pipeline), keep_pristine(pipeline, tmp_path, Place.FILES, CPU)
    assert all(bits(pristine.weight(at)) == loaded[at] for at in loaded)


def test_no_merge_writes_into_the_model_s_files(tiny_folder: Path) -> None:
    """The model may lie in the same pages of the files, mapped for it alone."""

    def files() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_folder.rglob("*.safetensors")}

    before, pipeline = files(), load_pipeline(tiny_folder, torch.float32)
    merger = open_merger(pipeline, tiny_folder, CPU, MemoryMode.RESIDENT)
    loaded = all_bits(pipeline)
    merger.merge([(style(pipeline, 1, "low-rank"), 2.0)])
    assert all_bits(pipeline) != loaded
    assert files() == before
    merger.merge([])
    assert all_bits(pipeline) == loaded


def test_mapped_weights_of_the_model_s_dtype_take_no_memory(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, torch.float32)
    pristine = keep_pristine(pipeline, tiny_folder, Place.FILES, CPU)
    mappings = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tiny_folder) in line
    ]
    for at in parameters_of(pipeline):
        address = pristine.weight(at).data_ptr()
        assert any(start <= address < stop for start, stop in mappings), at.name


def test_copies_are_made_of_what_is_written_and_of_nothing_else(tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder, torch.float32)
    copies, held = Copies(parameters_of(pipeline), CPU), style(pipeline, 1, "low-rank", every=3)
    merger = Merger(pipeline, copies, CPU)
    merger.merge([])
    merger.merge([(held, 1.0)])
    assert {at for at in parameters_of(pipeline) if at in copies} == held.deltas.keys()
