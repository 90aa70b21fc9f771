"""Modulation: shift, scale and gate of every block. Knows timesteps, guidance and pooled text; knows no tokens.

These depend on nothing else, so those of all steps can be made in one pass over weights that are a quarter of FLUX.1
(3.23 of 11.85 B in the blocks) and would otherwise be read for one vector a step. Mathematically that is the same; a
product of several rows rounds otherwise than that of one, by 1 to 2e-6 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# A FluxTransformer2DModel and its modules. Any: diffusers' mixins hide from a checker that they are modules.
Transformer: TypeAlias = Any
Block: TypeAlias = Any


@dataclass(frozen=True)
class Conditions:
    """All that modulation depends on."""

    times: Tensor  # [S], 0..1, of the model's dtype
    guidance: Tensor | None  # [1]; None for a model that takes none
    pooled: Tensor  # [1, P]

    def embed(self, transformer: Transformer, first: int, last: int) -> Tensor:
        """The embeddings of the steps `first` to `last` (not included), activated: [last − first, D]."""
        times = self.times[first:last] * 1000
        pooled = self.pooled.expand(len(times), -1)
        if self.guidance is None:
            return functional.silu(transformer.time_text_embed(times, pooled))
        guidance = (self.guidance.to(self.times.dtype) * 1000).expand(len(times))
        return functional.silu(transformer.time_text_embed(times, guidance, pooled))


class Modulation(Protocol):
    """The vectors of one step."""

    def double(self, index: int) -> tuple[Tensor, Tensor]:
        """For image and text: shift, scale, gate around attention, then the same around the MLP. [1, 6D] each."""

    def single(self, index: int) -> Tensor:
        """Shift, scale and gate: [1, 3D]."""

    def out(self) -> Tensor:
        """Scale and shift of the last norm: [1, 2D]."""


@dataclass(frozen=True)
class InTheLoop:
    """Each vector made where it is needed, as diffusers does it: the same to the bit."""

    transformer: Transformer
    embedding: Tensor  # [1, D], activated

    def double(self, index: int) -> tuple[Tensor, Tensor]:
        block = self.transformer.transformer_blocks[index]
        return block.norm1.linear(self.embedding), block.norm1_context.linear(self.embedding)

    def single(self, index: int) -> Tensor:
        made: Tensor = self.transformer.single_transformer_blocks[index].norm.linear(self.embedding)
        return made

    def out(self) -> Tensor:
        made: Tensor = self.transformer.norm_out.linear(self.embedding)
        return made


@dataclass(frozen=True)
class Ahead:
    """The vectors of all steps, made before the first: [S, …] each. 107 MB in bfloat16 for FLUX.1 and 50 steps."""

    doubles: tuple[tuple[Tensor, Tensor], ...]
    singles: tuple[Tensor, ...]
    last: Tensor

    @classmethod
    def of(cls, transformer: Transformer, conditions: Conditions) -> Ahead:
        every = InTheLoop(transformer, conditions.embed(transformer, 0, len(conditions.times)))
        return cls(
            tuple(every.double(index) for index in range(len(transformer.transformer_blocks))),
            tuple(every.single(index) for index in range(len(transformer.single_transformer_blocks))),
            every.out(),
        )

    def at(self, step: int) -> OneStep:
        return OneStep(self, step)


@dataclass(frozen=True)
class OneStep:
    """A row of what was made ahead."""

    ahead: Ahead
    step: int

    def double(self, index: int) -> tuple[Tensor, Tensor]:
        image, text = self.ahead.doubles[index]
        return self._row(image), self._row(text)

    def single(self, index: int) -> Tensor:
        return self._row(self.ahead.singles[index])

    def out(self) -> Tensor:
        return self._row(self.ahead.last)

    def _row(self, table: Tensor) -> Tensor:
        return table[self.step : self.step + 1]


def modulated(normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normed tokens [1, L, D] scaled and shifted, in place: AdaLN-Zero (Peebles & Xie 2023, DiT). [1, D] each."""
    return normed.mul_(1 + scale[:, None]).add_(shift[:, None])


def parts(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """[1, count · D] in its `count` vectors."""
    return torch.chunk(modulation, count, dim=1)
