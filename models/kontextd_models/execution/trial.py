"""Runs a model's blocks on made-up tokens: to compile, to time, to compare ways. Knows no edits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kontextd_models.transformer.attention import KeyValue, Rotary
from kontextd_models.transformer.forward import BlockRunner
from kontextd_models.transformer.modulation import Block, Transformer

_RUNS = 3
# Of what a block adds to its tokens. Our kernels are off from formulas that round after every operation by 2⁻²⁰ in
# float32 and 1 % in bfloat16, and by 3 % in float8, where a number's last bit decides to which side it is rounded.
_ALLOWED = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-6}
_ALLOWED_IN_FP8 = 2.0**-4


@dataclass(frozen=True)
class Tokens:
    """What blocks of each kind are given. No tensor twice: the compiler would take it for granted."""

    image: Tensor  # [1, N (+ M), D]
    text: Tensor  # [1, L, D]
    joined: Tensor  # [1, L + N (+ M), D]
    double_modulation: tuple[Tensor, Tensor]
    single_modulation: Tensor
    rotary: Rotary
    of_output: Rotary
    kept: KeyValue | None

    def double(self, way: BlockRunner, block: Block) -> tuple[Tensor, Tensor]:
        image, text, _ = way.double(block, self.image, self.text, *self.double_modulation, self.rotary, self.kept)
        return image, text

    def single(self, way: BlockRunner, block: Block) -> Tensor:
        return way.single(block, self.joined, self.single_modulation, self.rotary, self.kept)[0]

    def last_single(self, way: BlockRunner, block: Block) -> Tensor:
        given = block, self.joined, self.single_modulation, self.rotary, self.kept
        return way.last_single(*given, self.text.shape[1], self.of_output)[0]


@dataclass(frozen=True)
class Trial:
    """A model's blocks, for as many tokens of output and of reference as `image_tokens`."""

    transformer: Transformer
    text_tokens: int
    image_tokens: int
    device: torch.device
    dtype: torch.dtype
    fp8: bool

    @torch.no_grad()
    def run(self, way: BlockRunner) -> None:
        """A full step and a cached one, but for what lies before and behind the blocks."""
        *singles, last = self.transformer.single_transformer_blocks
        for tokens in self._steps():
            for block in self.transformer.transformer_blocks:
                tokens.double(way, block)
            for block in singles:
                tokens.single(way, block)
            tokens.last_single(way, last)

    def seconds(self, *ways: BlockRunner) -> list[float]:
        """What each takes for a `run`: medians of runs in turns. Ways that have to compile have run before."""
        turns = [[self._timed(way) for way in ways] for _ in range(_RUNS)]
        return [statistics.median(taken) for taken in zip(*turns, strict=True)]

    @torch.no_grad()
    def error(self, way: BlockRunner, other: BlockRunner) -> float:
        """The largest difference of what they make of blocks, in units of what is allowed; NaN for NaN."""
        double, singles = self.transformer.transformer_blocks[0], self.transformer.single_transformer_blocks
        first, last = singles[0], singles[-1]
        errors: list[Tensor] = []
        for tokens in self._steps():
            output = tokens.joined[:, self.text_tokens : self.text_tokens + self.image_tokens]
            made, by_other = tokens.double(way, double), tokens.double(other, double)
            errors += map(self._error, made, by_other, (tokens.image, tokens.text))
            errors.append(self._error(tokens.single(way, first), tokens.single(other, first), tokens.joined))
            errors.append(self._error(tokens.last_single(way, last), tokens.last_single(other, last), output))
        return float(torch.stack(errors).max())

    def _error(self, made: Tensor, by_other: Tensor, given: Tensor) -> Tensor:
        made, by_other, given = made.float(), by_other.float(), given.float()
        share = _ALLOWED_IN_FP8 if self.fp8 else _ALLOWED[self.dtype]
        allowed = share * (by_other - given).norm() + torch.finfo(self.dtype).eps / 2 * by_other.norm()
        error: Tensor = (made - by_other).norm() / allowed
        return error

    def _steps(self) -> Iterator[Tokens]:
        """Of a full step and of a cached one."""
        config, random = self.transformer.config, torch.Generator(self.device).manual_seed(0)
        heads, head_width = config.num_attention_heads, config.attention_head_dim
        width = heads * head_width

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device).to(self.dtype)

        def rotary(tokens: int) -> Rotary:
            angles = torch.rand(tokens, head_width // 2, generator=random, device=self.device) * torch.pi
            cosine, sine = (each.repeat_interleave(2, dim=1) for each in (angles.cos(), angles.sin()))
            return cosine.clone(), sine.clone()  # no views: a graph for these would take nothing else

        kept = KeyValue(*(draw(1, self.image_tokens, heads, head_width) for _ in range(2)))
        for seen, others in ((2 * self.image_tokens, None), (self.image_tokens, kept)):
            yield Tokens(
                image=draw(1, seen, width),
                text=draw(1, self.text_tokens, width),
                joined=draw(1, self.text_tokens + seen, width),
                double_modulation=(draw(1, 6 * width), draw(1, 6 * width)),
                single_modulation=draw(1, 3 * width),
                rotary=rotary(self.text_tokens + seen),
                of_output=rotary(self.image_tokens),
                kept=others,
            )

    def _timed(self, way: BlockRunner) -> float:
        self._wait()
        began = time.perf_counter()
        self.run(way)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
