"""The recipe of the embedded model, without training it: its parts do what the stages rely on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from kontextd_models.embedded import architecture, train_flow, vae_init
from kontextd_models.embedded.data import Photos, procedural
from kontextd_models.embedded.loop import Schedule, averaged, cycle, run
from kontextd_models.embedded.photos import collect, free_photos, rcc_files
from kontextd_models.embedded.train_flow import BlockEncoder
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: src/animals/resource/moose.jpg
       src/animals/resource/panda.jpg
Copyright: 2005 A. Photographer
License: public-domain
Comment: https://example.org/moose

Files: src/tools/resource/hammer.jpg
Copyright: 2006 B. Photographer
License: CC-BY-SA-3.0

Files: src/animals/resource/panda.jpg
Copyright: 2007 C. Photographer
License: GPL-2+

Files: src/tools/resource/saw.jpg
Copyright: 2008 D. Photographer
License: CC-BY-2.0
"""


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        pixels = procedural(200, 300, random.Random(seed)).permute(1, 2, 0).mul(255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return Photos(folder)


# The loop.


def problem() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 1), torch.tensor([[1.0], [-2.0], [0.5], [3.0]])


def learn(steps: int, schedule: Schedule, checkpoint: Path) -> None:
    """Runs to `steps` of the schedule, then stops as if the machine had been switched off.

    With a learning rate for matrices, the weight is trained by Muon and the bias by AdamW.
    """
    module, truth = problem()

    def loss_of(step: int, rng: random.Random) -> Tensor:
        if step == steps:
            raise KeyboardInterrupt
        inputs = torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for _ in range(16)])
        return (module(inputs) - inputs @ truth).square().mean()

    try:
        matrices = [module.weight] if schedule.matrix_learning_rate else []
        run(module, module.parameters(), loss_of, schedule, checkpoint, matrices)
    except KeyboardInterrupt:
        assert steps < schedule.steps


def test_training_learns_and_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    learn(200, Schedule(200, 0.1, average=0.9), tmp_path / "whole.safetensors")
    weights = averaged(tmp_path / "whole.safetensors")["weight"]
    assert torch.allclose(weights.flatten(), torch.tensor([1.0, -2.0, 0.5, 3.0]), atol=0.02)


@pytest.mark.parametrize("matrix_learning_rate", [0.0, 0.1])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, matrix_learning_rate: float) -> None:
    schedule = Schedule(60, 0.05, matrix_learning_rate=matrix_learning_rate, checkpoint_every=10)
    learn(60, schedule, tmp_path / "whole.safetensors")
    learn(25, schedule, tmp_path / "stopped.safetensors")
    learn(60, schedule, tmp_path / "stopped.safetensors")
    whole, stopped = averaged(tmp_path / "whole.safetensors"), averaged(tmp_path / "stopped.safetensors")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_muon_learns_too(tmp_path: Path) -> None:
    learn(300, Schedule(300, 0.1, matrix_learning_rate=0.2, average=0.9), tmp_path / "whole.safetensors")
    weights = averaged(tmp_path / "whole.safetensors")["weight"]
    assert torch.allclose(weights.flatten(), torch.tensor([1.0, -2.0, 0.5, 3.0]), atol=0.05)


def test_the_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    schedule = Schedule(100, 1.0, warm_up=0.1)
    rates = [cycle(schedule, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.002)


# The VAE's start.


def start(photos: Photos) -> tuple[architecture.Vae, Tensor, Tensor]:
    rng = random.Random(0)
    pictures = torch.stack([photos.crop(64, 64, rng) for _ in range(64)]) * 2 - 1
    first, second = vae_init.block_transform(pictures, 16)
    vae = architecture.vae().eval()
    vae_init.init_encoder(vae, first, second)
    vae_init.init_decoder(vae, torch.Generator().manual_seed(0))
    return vae, first, second


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (128, 48)])
def test_the_encoder_computes_the_block_transform_at_any_size(photos: Photos, size: tuple[int, int]) -> None:
    vae, first, second = start(photos)
    pictures = torch.stack([photos.crop(*size, random.Random(seed)) for seed in range(2)]) * 2 - 1
    blocks = vae_init.space_to_depth(vae_init.space_to_depth(pictures))
    coefficients = vae_init.space_to_depth(torch.einsum("oc,bchw->bohw", first, blocks))
    expected = torch.einsum("oc,bchw->bohw", second, coefficients)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
    assert torch.allclose(latents, expected, atol=2e-3)
    assert latents.shape == (2, 16, size[0] // 8, size[1] // 8)


def test_a_mirrored_picture_has_mirrored_latents_up_to_signs(photos: Photos) -> None:
    vae, _, _ = start(photos)
    picture = photos.crop(64, 64, random.Random(5))[None] * 2 - 1
    with torch.no_grad():
        latents, mirrored = (vae.encode(each).latent_dist.mode() for each in (picture, picture.flip(3)))
    assert torch.allclose(latents.abs(), mirrored.flip(3).abs(), atol=2e-3)


def test_the_transform_keeps_most_of_a_picture(photos: Photos) -> None:
    pictures = torch.stack([photos.crop(64, 64, random.Random(seed)) for seed in range(32)]) * 2 - 1
    first, second = vae_init.block_transform(pictures, 16)
    composed = second @ torch.block_diag(*[first] * 4)  # [16, 192]
    blocks = vae_init.space_to_depth(vae_init.space_to_depth(vae_init.space_to_depth(pictures)))
    rows = blocks.permute(0, 2, 3, 1).flatten(0, 2)
    order = torch.arange(192).view(2, 2, 48).flatten()
    kept = rows[:, order] @ composed.T
    assert kept.shape[1] == 16
    assert rows.var(0).sum() > 0
    explained = torch.linalg.lstsq(kept - kept.mean(0), rows - rows.mean(0)).solution
    left = (rows - rows.mean(0) - (kept - kept.mean(0)) @ explained).square().mean()
    assert left < 0.1 * rows.var(0).mean()


def test_training_leaves_the_constant_channels_alone(photos: Photos) -> None:
    vae, _, _ = start(photos)
    vae_init.hold_constants(vae.decoder)
    before = {name: value[-2:].clone() for name, value in vae.decoder.named_parameters() if name.endswith("conv1.bias")}
    picture = photos.crop(32, 32, random.Random(0))[None]
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=0.1, weight_decay=0.0)
    vae.decode(vae.encode(picture).latent_dist.mode()).sample.square().mean().backward()
    optimiser.step()
    assert before
    for name, value in vae.decoder.named_parameters():
        if name in before:
            assert torch.equal(value[-2:], before[name])


# The photos.


def test_only_free_photos_are_taken_and_a_later_paragraph_overrides() -> None:
    found = free_photos(COPYRIGHT)
    assert {name: license_name for name, (license_name, _) in found.items()} == {
        "resource/moose": "public-domain",
        "resource/saw": "CC-BY-2.0",
    }
    assert found["resource/moose"][1] == "2005 A. Photographer https://example.org/moose"


def rcc(folder: str, files: dict[str, bytes]) -> bytes:
    """A Qt resource file of format 2 with one folder of files; every second one is compressed."""
    names, payload, offsets = bytearray(), bytearray(), {}
    for name in (folder, *files):
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII8x", 0, 2, 1, 1) + struct.pack(">IHII8x", offsets[folder], 2, len(files), 2)
    for index, (name, content) in enumerate(files.items()):
        compressed = index % 2
        body = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        tree += struct.pack(">IHHHI8x", offsets[name], compressed, 0, 0, len(payload))
        payload += struct.pack(">I", len(body)) + body
    start = 20
    header = struct.pack(">4sIIII", b"qres", 2, start, start + len(tree), start + len(tree) + len(payload))
    return header + tree + bytes(payload) + bytes(names)


def test_the_files_of_a_qt_resource_archive_are_read() -> None:
    files = {"moose.webp": b"a" * 100, "saw.webp": b"b" * 200, "notes.txt": b""}
    assert dict(rcc_files(rcc("resource", files))) == {f"/resource/{name}": data for name, data in files.items()}


def test_anything_else_is_no_archive() -> None:
    with pytest.raises(ValueError, match="not a Qt resource file"):
        list(rcc_files(b"RIFF" + bytes(40)))


def test_the_free_photos_of_a_package_are_collected_with_their_attribution(tmp_path: Path) -> None:
    root = tmp_path / "package"
    (root / "usr/share/doc/gcompris-qt-data").mkdir(parents=True)
    (root / "usr/share/doc/gcompris-qt-data/copyright").write_text(COPYRIGHT)
    (root / "usr/share/gcompris-qt/rcc").mkdir(parents=True)
    files = {"moose.webp": b"moose", "hammer.webp": b"hammer", "saw.webp": b"saw"}
    (root / "usr/share/gcompris-qt/rcc/animals.rcc").write_bytes(rcc("resource", files))
    lines = collect(root, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["resource-moose.webp", "resource-saw.webp"]
    assert json.dumps(lines).count("Photographer") == 2


def test_crops_have_the_size_that_is_asked_for_and_repeat_with_their_seed(photos: Photos) -> None:
    for height, width in ((64, 64), (32, 256), (256, 16)):
        crops = [photos.crop(height, width, random.Random(seed)) for seed in range(20)]
        assert {tuple(crop.shape) for crop in crops} == {(3, height, width)}
        assert all(crop.min() >= 0 and crop.max() <= 1 for crop in crops)
        assert torch.equal(crops[3], photos.crop(height, width, random.Random(3)))


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no photos in"):
        Photos(tmp_path)


def test_the_encoders_matrix_gives_the_pipelines_tokens(photos: Photos) -> None:
    vae, _, _ = start(photos)
    pictures = torch.stack([photos.crop(48, 64, random.Random(seed)) for seed in range(2)])
    with torch.no_grad():
        latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
        tokens = BlockEncoder.of(vae).tokens(pictures)
    assert torch.allclose(tokens, FluxKontextPipeline._pack_latents(latents, *latents.shape), atol=2e-3)


# Refining.


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # only some CPUs train in bfloat16
def test_refining_goes_on_from_an_exported_folder_and_changes_its_transformer_alone(
    photos: Photos, embedded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_flow, "_POOL", 200)
    monkeypatch.setattr(train_flow, "_REFINE_GRIDS", ((2, 2),))
    folder = tmp_path / "model"
    shutil.copytree(embedded_folder, folder)
    train_flow.refine(photos, folder, tmp_path, torch.device("cpu"), steps=2)
    before, after = recorded(embedded_folder), recorded(folder)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [
        "transformer/diffusion_pytorch_model.safetensors"
    ]
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == after[str(weights.relative_to(folder))]
    was = load_file(embedded_folder / "transformer" / weights.name)
    for name, value in load_file(weights).items():
        assert value.dtype == torch.float16
        assert (value - was[name]).abs().max() < 0.01


def recorded(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "checksums.json").read_text()))
