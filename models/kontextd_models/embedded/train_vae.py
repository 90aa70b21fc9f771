"""Stage "vae": a fixed linear encoder, and a decoder that learns to undo it. Knows nothing of the transformer."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontextd_models.embedded import architecture, vae_init
from kontextd_models.embedded.data import Photos
from kontextd_models.embedded.edits import EDITS
from kontextd_models.embedded.loop import Schedule, run

_SCHEDULE = Schedule(steps=2500, learning_rate=1.2e-3)
_BATCH, _CROP = 16, 64


def encoder_file(work: Path) -> Path:
    return work / "vae_start.safetensors"


def started(work: Path) -> architecture.Vae:
    """The VAE with its final encoder and its decoder as it was before training."""
    vae = architecture.vae()
    vae.load_state_dict(load_file(encoder_file(work)))
    return vae


def _start(photos: Photos, work: Path) -> None:
    rng = random.Random(0)
    pictures = torch.stack([photos.crop(128, 128, rng) for _ in range(400)]) * 2 - 1
    vae = architecture.vae()
    vae_init.init_encoder(vae, *vae_init.block_transform(pictures, vae.config.latent_channels))
    vae_init.init_decoder(vae, torch.Generator().manual_seed(0))
    save_file({name: value.contiguous() for name, value in vae.state_dict().items()}, encoder_file(work))


def crops(photos: Photos, rng: random.Random) -> Tensor:
    """[B, 3, 64, 64] in −1..1: crops, a third of them edited, since the decoder must draw edits too."""
    pictures = []
    for _ in range(_BATCH):
        picture = photos.crop(_CROP, _CROP, rng)
        if rng.random() < 1 / 3:
            picture = rng.choice(EDITS).draw(picture, rng)
        pictures.append(picture)
    return torch.stack(pictures) * 2 - 1


def train(photos: Photos, work: Path, device: torch.device, steps: int | None) -> None:
    """Minimise the decoder's mean squared error, which is what PSNR measures."""
    if not encoder_file(work).exists():
        _start(photos, work)
    vae = started(work).to(device)
    vae_init.hold_constants(vae.decoder)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        pictures = crops(photos, rng).to(device)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mode()
        drawn: Tensor = vae.decode(latents).sample
        return (drawn - pictures).square().mean()

    schedule = _SCHEDULE if steps is None else Schedule(steps, _SCHEDULE.learning_rate)
    run(vae, vae.decoder.parameters(), loss_of, schedule, work / "vae.safetensors")
