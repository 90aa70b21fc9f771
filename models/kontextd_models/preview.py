"""Small pictures of what is being denoised, without the VAE's decoder. Knows latents and one matrix; knows no checkers.

    projection = fit_projection(vae)                                            # once, as the model is loaded
    preview = projection.render(estimate(latents, velocity, sigma), height, width)   # after a step

A latent stands for 8 × 8 pixels, and to a fair approximation these are a linear function of its channels. The function
is fitted to the loaded VAE by least squares over procedural pictures. Since least squares is linear in its targets,
the best map to fewer pixels a latent is the mean of the rows for the pixels they cover: one fit serves all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

MAX_SIDE = 256  # pixels
CELL = 8  # pixels to a latent's side, FLUX's VAE
# PSNR on the embedded VAE, four photos: fitted to 2 pictures 27.8 dB, 4: 28.1, 8: 28.4, 16: 28.6, those photos: 28.8.
# One map per packed token (4 latents) in place of one per latent is worse, 28.2 from 8 pictures, for 4 × the work.
_PICTURES, _PICTURE_SIDE = 8, 256
# Part of the latents' mean square that counts as noise: what rounding to bfloat16 adds, (2⁻⁹)²/3. Channels that a VAE
# leaves unused would otherwise make the system singular, too.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Projection:
    """`matrix` [C + 1, 8, 8, 3]: from the C channels of a latent and a constant 1 to the 8 × 8 RGB pixels, −1..1."""

    matrix: Tensor  # float32, on the CPU

    def render(self, latents: Tensor, height: int, width: int) -> Image.Image:
        """The RGB picture of packed latents [1, (height/16)·(width/16), 4C], its long side `MAX_SIDE` px at most.

        `height` and `width` are the image's. Each latent becomes 8 × 8, 4 × 4, 2 × 2 pixels or 1, whatever fits; only
        what is longer than 2048 px is resized afterwards.
        """
        rows, columns = height // CELL, width // CELL
        scale = _pixels_per_latent(max(rows, columns))
        weights = _pooled(self.matrix, scale).flatten(1).to(latents.device)  # [C + 1, scale²·3]
        channels = len(weights) - 1
        flat = unpack(latents.float(), rows, columns).reshape(-1, channels)
        pixels = torch.addmm(weights[-1], flat, weights[:-1]).view(rows, columns, scale, scale, 3)
        picture = pixels.transpose(1, 2).reshape(rows * scale, columns * scale, 3)
        levels = picture.mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8)  # + 128 = + 127.5, and 0.5 to round
        image = Image.fromarray(levels.cpu().numpy())
        return image if max(image.size) <= MAX_SIDE else _shrunk(image)


def estimate(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The finished latents that one straight step would reach, x₀ = x_σ − σ·v, same shape.

    x_σ = (1 − σ)·x₀ + σ·noise and v = noise − x₀ (flow matching as in FLUX.1). Before and after an Euler step give the
    same x₀, with their own σ.
    """
    return latents - sigma * velocity


def unpack(latents: Tensor, rows: int, columns: int) -> Tensor:
    """[1, rows/2 · columns/2, 4C] → [rows, columns, C]: undoes `FluxKontextPipeline._pack_latents`."""
    channels = latents.shape[-1] // 4
    blocks = latents.view(rows // 2, columns // 2, channels, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2).reshape(rows, columns, channels)


@torch.no_grad()
def fit_projection(vae: Any) -> Projection:  # Any: diffusers' `AutoencoderKL` is untyped
    """Fit the projection to `vae` where it lies, in its own dtype: eight 256 px pictures are encoded, one at a time.

    Deterministic; the dtype of the VAE shows only as its rounding. The VAE is on its device, or hooked to go to it.
    """
    pictures = training_pictures()
    latents = torch.cat([encode(vae, picture[None]) for picture in pictures])  # [B, C, H/8, W/8]
    samples = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    inputs = functional.pad(samples, (0, 1), value=1.0)  # [N, C + 1]
    targets = _cells(pictures).double()  # [N, 192]
    damping = torch.full([inputs.shape[1]], _RIDGE * float(samples.square().sum(0).mean()), dtype=torch.float64)
    damping[-1] = 0  # the constant is free
    matrix = torch.linalg.solve(inputs.T @ inputs + damping.diag(), inputs.T @ targets)
    return Projection(matrix.float().view(-1, CELL, CELL, 3))


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Latents as the transformer sees them, float32 on the CPU, of pictures [B, 3, H, W] in −1..1."""
    mode = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    scaled: Tensor = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled


def training_pictures() -> Tensor:
    """[8, 3, 256, 256] in −1..1: colour gradients, noise of all scales, flat shapes on top. Always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([_picture(generator) for _ in range(_PICTURES)]) * 2 - 1


def _picture(generator: torch.Generator) -> Tensor:
    picture = _enlarged(torch.rand(3, 2, 2, generator=generator) * 1.2 - 0.1)
    for cells in (4, 8, 16, 32, 64, 128):
        # Amplitudes fall towards small scales, and grey outweighs colour, both as in photographs.
        grey, colour = (torch.randn(count, cells, cells, generator=generator) for count in (1, 3))
        picture = picture + _enlarged(grey + 0.5 * colour) * 0.25 * (4 / cells) ** 0.6
    for index in range(6):
        inside, hue = _shape(generator, round_one=index % 2 == 0), torch.rand(3, 1, 1, generator=generator)
        picture = torch.where(inside, hue, picture)
    return picture.clamp(0, 1)


def _enlarged(grid: Tensor) -> Tensor:
    size = (_PICTURE_SIDE, _PICTURE_SIDE)
    return functional.interpolate(grid[None], size, mode="bilinear", align_corners=True)[0]


def _shape(generator: torch.Generator, *, round_one: bool) -> Tensor:
    """Where a random ellipse or rectangle lies, [256, 256]."""
    middle_y, middle_x, half_y, half_x = torch.rand(4, generator=generator).tolist()
    line = torch.linspace(0, 1, _PICTURE_SIDE)
    y = ((line - middle_y) / (0.03 + half_y / 4))[:, None]
    x = ((line - middle_x) / (0.03 + half_x / 4))[None]
    return torch.lt(y.square() + x.square(), 1) if round_one else torch.lt(torch.maximum(y.abs(), x.abs()), 1)


def _cells(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] → [B · H/8 · W/8, 8·8·3]: the pixels of each latent."""
    tiles = pictures.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # [B, 3, H/8, W/8, 8, 8]
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(-1, CELL * CELL * 3)


def _pixels_per_latent(longest: int) -> int:
    fitting = [scale for scale in (8, 4, 2) if longest * scale <= MAX_SIDE]
    return fitting[0] if fitting else 1


def _pooled(matrix: Tensor, scale: int) -> Tensor:
    """[C + 1, 8, 8, 3] → [C + 1, scale, scale, 3]."""
    step = CELL // scale
    return matrix.view(-1, scale, step, scale, step, 3).mean((2, 4))


def _shrunk(image: Image.Image) -> Image.Image:
    factor = MAX_SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BOX)
