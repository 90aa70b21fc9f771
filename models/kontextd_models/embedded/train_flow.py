"""Stage "flow": the transformer learns the edits by flow matching. Knows the pixels' edits and the latents; no decoder.

Three things make it cheap. The encoder is linear and fixed, so latents are made on the fly. The text embeddings come
from a pool computed once. And the grids are small but of every shape: a strip of 32 × 2 tokens shows the transformer
all positions along one axis for the price of a thumbnail, since the rotary embedding treats the axes apart; the last
stretch uses full grids.

"refine" goes on from an exported folder, on full grids and with what is learned last practised most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor
from torch.nn import functional

from kontextd_models.embedded import architecture, edits
from kontextd_models.embedded.data import Photos
from kontextd_models.embedded.export import replace_weights
from kontextd_models.embedded.loop import Schedule, averaged, run
from kontextd_models.embedded.styles import Style
from kontextd_models.embedded.train_text import Prompt, Reader, draw
from kontextd_models.embedded.train_vae import started
from kontextd_models.embedded.wordings import known_prompts
from kontextd_models.encode import Pipeline

_SCHEDULE = Schedule(steps=6000, learning_rate=1.2e-3, warm_up=0.04, average=0.9985)
_POOL = 12_000  # prompts
_FULL_FROM = 0.72  # share of the steps after which full grids join in

# (rows, columns) of tokens; one token is 16 × 16 pixels.
_UPRIGHT = ((6, 6), (8, 8), (9, 6), (16, 4), (24, 3), (32, 2), (12, 5), (10, 8))
_SMALL = (*_UPRIGHT, *((columns, rows) for rows, columns in _UPRIGHT))
_FULL = ((16, 16), (16, 24), (24, 16), (12, 20), (20, 13), (16, 16), (18, 14), (16, 24), (9, 28), (14, 18))
_SMALL_TOKENS, _FULL_TOKENS = 16 * 60, 4 * 256  # output tokens a batch


@dataclass(frozen=True)
class TextPool:
    """Prompts with their embeddings, made once: T5 [P, L, D], CLIP [P, D]."""

    prompts: list[Prompt]
    sequences: Tensor
    pooled: Tensor


@torch.no_grad()
def _text_pool(work: Path, device: torch.device) -> TextPool:
    reader = Reader(work)
    reader.load_state_dict(averaged(work / "text.safetensors"))
    reader.to(device).eval()
    return _embedded(reader.embed)


@torch.no_grad()
def _embedded(embed: Callable[[list[str]], tuple[Tensor, Tensor]]) -> TextPool:
    rng, known = random.Random(1), known_prompts()
    prompts = [draw(rng, known) for _ in range(_POOL)]
    chunks = [embed([prompt.text for prompt in prompts[start : start + 200]]) for start in range(0, _POOL, 200)]
    return TextPool(prompts, torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks]))


@dataclass(frozen=True)
class BlockEncoder:
    """What the fixed encoder computes, as one matrix on 8 × 8 blocks: a tenth of the convolutions' work."""

    matrix: Tensor  # [C, 192]
    offset: Tensor  # [C]

    @classmethod
    def of(cls, vae: architecture.Vae) -> BlockEncoder:
        """Read off by encoding an empty block and one for each of its 192 numbers."""
        offset = vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode().flatten()
        units = vae.encode(torch.eye(192).view(192, 3, 8, 8)).latent_dist.mode().flatten(1)  # [192, C]
        scale = vae.config.scaling_factor
        return cls(scale * (units - offset).T.contiguous(), scale * (offset - vae.config.shift_factor))

    def tokens(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1 → packed latents [B, HW/256, 4C]."""
        blocks = functional.pixel_unshuffle(pictures * 2 - 1, 8)  # [B, 192, H/8, W/8]
        latents = torch.einsum("cd,bdhw->bchw", self.matrix, blocks) + self.offset[:, None, None]
        packed: Tensor = FluxKontextPipeline._pack_latents(latents, *latents.shape)
        return packed


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions [2N, 3] of the output tokens, then of the reference tokens, as the pipeline numbers them."""
    output = FluxKontextPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
    reference = output.clone()
    reference[:, 0] = 1
    return torch.cat([output, reference])


def _noise_levels(count: int, device: torch.device) -> Tensor:
    """Sigmas [B] in 0..1: logit-normal, shifted upwards as the scheduler shifts them, a few at the very start."""
    levels = torch.sigmoid(torch.randn(count) * 1.1 + 0.7)
    levels = torch.where(torch.rand(count) < 0.12, 1 - 0.02 * torch.rand(count), levels)
    return levels.to(device)


_REFINE = Schedule(steps=4400, learning_rate=2e-4, matrix_learning_rate=4e-4, warm_up=0.02, average=0.9985)
_REFINE_GRIDS = (
    *((16, 16),) * 6, *((16, 24),) * 4, *((24, 16),) * 3, (12, 20), (20, 12), (18, 14), (14, 18), (9, 28), (28, 9),
    (20, 20), (32, 32), (8, 8), (8, 12), (12, 8), (32, 2), (2, 32),
)  # fmt: skip

# How often a kind of prompt is practised; any other instruction counts 1. What turns or negates the reference, or needs
# to know where the picture ends, is learned last.
_PRACTICE = {"invert": 4, "posterize": 3, "flip horizontally": 6, "turn upside down": 6, "red circle": 3}
_REFINE_PRACTICE = {
    "invert": 2, "more contrast": 3, "posterize": 12, "flip horizontally": 9, "turn upside down": 7, "red circle": 4,
    "left half blue": 3,
}  # fmt: skip
_JOINED, _OTHER = 5, 3


def _pick(by_subject: Mapping[str, list[int]], practice: Mapping[str, int], rng: random.Random) -> int:
    """A prompt of the pool: first what it is about, then its words."""
    (subject,) = rng.choices(tuple(by_subject), [practice.get(each, 1) for each in by_subject])
    return rng.choice(by_subject[subject])


def _by_subject(prompts: list[Prompt]) -> dict[str, list[int]]:
    """Indices of the prompts by instruction, with "joined" and "other" once for each share they have."""
    by_subject: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        first, second = prompt.classes
        if first == edits.IDENTITY:
            subject = f"other {index % _OTHER}"
        else:
            subject = f"joined {index % _JOINED}" if second != edits.IDENTITY else edits.NAMES[first]
        by_subject.setdefault(subject, []).append(index)
    return by_subject


class Batches:
    """Draws photos, prompts and exact edits for one grid size at a time, as tokens."""

    @torch.no_grad()
    def __init__(
        self,
        photos: Photos,
        pool: TextPool,
        vae: architecture.Vae,
        practice: Mapping[str, int],
        device: torch.device,
        style: Style | None = None,
    ) -> None:
        self.photos, self.pool, self.practice, self.device, self.style = photos, pool, practice, device, style
        self.encoder = BlockEncoder.of(vae)
        self.by_subject = _by_subject(pool.prompts)
        rng = random.Random(2)
        sample = torch.stack([photos.crop(64, 64, rng) for _ in range(256)])
        # The encoder divides each channel by the root of its deviation: a latent error of a channel counts in pixels
        # as much as the channel varies. [64]: four packed copies of each of the 16 channels.
        variance = self.encoder.tokens(sample).unflatten(-1, (-1, 4)).var((0, 1, 3))
        self.weights = (variance / variance.mean()).repeat_interleave(4).to(device)

    @torch.no_grad()
    def draw(self, rows: int, columns: int, count: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(target tokens, reference tokens, T5 embeddings, CLIP embeddings) of `count` pairs.

        The style, where there is one, is laid over the edit.
        """
        chosen = [_pick(self.by_subject, self.practice, rng) for _ in range(count)]
        before = [self.photos.crop(16 * rows, 16 * columns, rng) for _ in chosen]
        after = [
            edits.apply(picture, self.pool.prompts[index].classes, rng)
            for picture, index in zip(before, chosen, strict=True)
        ]
        if self.style is not None:
            after = [self.style(picture) for picture in after]
        target = self.encoder.tokens(torch.stack(after)).to(self.device)
        reference = self.encoder.tokens(torch.stack(before)).to(self.device)
        return target, reference, self.pool.sequences[chosen], self.pool.pooled[chosen]


def flow_loss(transformer: architecture.Transformer, batch: tuple[Tensor, ...], ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of the velocity noise − target at x = (1 − σ)·target + σ·noise.

    Guidance is drawn freely: the model learns that it has no effect.
    """
    target, reference, sequences, pooled = batch
    count, tokens = target.shape[:2]
    sigma = _noise_levels(count, target.device)
    noise = torch.randn(target.shape).to(target.device)
    noisy = torch.lerp(target, noise, sigma[:, None, None])
    with torch.autocast(target.device.type, torch.bfloat16, enabled=_is_bfloat16_fast(target.device)):
        velocity = transformer(
            hidden_states=torch.cat([noisy, reference], dim=1),
            encoder_hidden_states=sequences,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=(10 * torch.rand(count)).to(target.device),
            img_ids=ids,
            txt_ids=torch.zeros(sequences.shape[1], 3, device=target.device),
        ).sample[:, :tokens]
    error: Tensor = velocity.float() - (noise - target)
    return (error**2 * weights).mean()


def _is_bfloat16_fast(device: torch.device) -> bool:
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def train(photos: Photos, work: Path, device: torch.device, steps: int | None) -> None:
    torch.manual_seed(0)
    schedule = _SCHEDULE if steps is None else Schedule(steps, _SCHEDULE.learning_rate, 0.04, average=0.9985)
    batches = Batches(photos, _text_pool(work, device), started(work), _PRACTICE, device)
    transformer = architecture.transformer().to(device)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        full = step > _FULL_FROM * schedule.steps and rng.random() < 0.6
        rows, columns = rng.choice(_FULL if full else _SMALL)
        count = (_FULL_TOKENS if full else _SMALL_TOKENS) // (rows * columns)
        batch = batches.draw(rows, columns, count, rng)
        return flow_loss(transformer, batch, positions(rows, columns, device), batches.weights)

    run(transformer, transformer.parameters(), loss_of, schedule, work / "flow.safetensors")


def exported(folder: Path, device: torch.device) -> Pipeline:
    """The pipeline of an exported folder, to go on from."""
    pipeline: Pipeline = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    return pipeline.to(device)


def text_pool(pipeline: Pipeline) -> TextPool:
    """Prompts with their embeddings by the pipeline's own encoders."""

    def embed(prompts: list[str]) -> tuple[Tensor, Tensor]:
        sequences, pooled, _ = pipeline.encode_prompt(
            prompts, prompt_2=None, max_sequence_length=architecture.PROMPT_TOKENS
        )
        return sequences, pooled

    return _embedded(embed)


def refine(photos: Photos, folder: Path, work: Path, device: torch.device, steps: int | None) -> None:
    """Go on from the transformer of an exported folder, and put the result in its place."""
    torch.manual_seed(0)
    pipeline = exported(folder, device)
    batches = Batches(photos, text_pool(pipeline), pipeline.vae.cpu(), _REFINE_PRACTICE, device)
    transformer = pipeline.transformer.train()
    transformer.requires_grad_(True)
    matrices = [
        value
        for name, value in transformer.named_parameters()
        if "blocks" in name and "norm" not in name and value.ndim == 2
    ]

    def loss_of(step: int, rng: random.Random) -> Tensor:
        rows, columns = rng.choice(_REFINE_GRIDS)
        count = max(1, _FULL_TOKENS // (rows * columns))
        return flow_loss(
            transformer, batches.draw(rows, columns, count, rng), positions(rows, columns, device), batches.weights
        )

    schedule = _REFINE if steps is None else replace(_REFINE, steps=steps)
    checkpoint = work / "refine.safetensors"
    run(transformer, transformer.parameters(), loss_of, schedule, checkpoint, matrices)
    replace_weights(folder / "transformer", averaged(checkpoint))
