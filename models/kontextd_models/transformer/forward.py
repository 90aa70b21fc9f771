"""The forward passes of one request. Knows the transformer and what a request's steps share; knows no presets.

What does not change from step to step is made once: the text's embedding and the rotary positions, and where it is
asked for the modulation. Full passes with modulation in the loop are to the bit those of diffusers 0.42, unless the
last block is always trimmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kontextd_models.encode import EncodedPrompt, EncodedReference
from kontextd_models.transformer.attention import KeyValue, Rotary
from kontextd_models.transformer.blocks import Double, LastSingle, Single, double_block, last_single_block, single_block
from kontextd_models.transformer.modulation import (
    Ahead,
    Block,
    Conditions,
    InTheLoop,
    Modulation,
    Transformer,
    modulated,
    parts,
)

# What a single block is given: itself, tokens, modulation, positions, keys that were kept.
Given: TypeAlias = tuple[Block, Tensor, Tensor, Rotary, KeyValue | None]


@dataclass(frozen=True)
class Inputs:
    """What every step of a request reads beside the latents. `output_ids` [N, 3] say where each output token lies."""

    prompt: EncodedPrompt
    reference: EncodedReference
    output_ids: Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Kept:
    """Keys and values of the M reference tokens in every block, in order.

    2.9 GB in bfloat16 for FLUX.1 and a reference of 1 MP: 57 blocks × 2 × 4096 tokens × 3072.
    """

    blocks: tuple[KeyValue, ...]

    @property
    def size_bytes(self) -> int:
        return sum(block.size_bytes for block in self.blocks)


class Forward(Protocol):
    """Velocities [1, N, C] of latents [1, N, C] at a step of the request."""

    keeps: bool  # whether `cached` is to be had
    trims: bool  # whether the last block runs the output's tokens alone in every pass

    def full(self, step: int, latents: Tensor, *, keep: bool = False) -> tuple[Tensor, Kept | None]:
        """All tokens; with `keep`, also the reference's keys and values."""

    def cached(self, step: int, latents: Tensor, kept: Kept) -> Tensor:
        """Text and output tokens only, looking at what was kept of the reference."""


class BlockRunner(Protocol):
    """A way to run the kinds of block."""

    @property
    def double(self) -> Double: ...

    @property
    def single(self) -> Single: ...

    @property
    def last_single(self) -> LastSingle: ...


class AsTheyStand:
    """The blocks' functions themselves."""

    double = staticmethod(double_block)
    single = staticmethod(single_block)
    last_single = staticmethod(last_single_block)


_AS_THEY_STAND = AsTheyStand()


class Trim(Enum):
    """When the last block runs the output's tokens alone, the only ones that are read behind it."""

    NEVER = "never"
    WHERE_EQUAL = "in full passes, where the first one shows that it changes no bit"
    ALWAYS = "always"


class WrittenOut:
    """Over the blocks of a transformer whose weights lie on the device.

    `modulation_ahead` and `Trim.ALWAYS` leave out what changes no result but by its rounding. With `Trim.WHERE_EQUAL`
    the first full pass runs the last block both ways: how a product rounds goes by its shape and not by its numbers,
    so that what is equal once is equal in all full passes of the request.
    """

    keeps = True

    def __init__(
        self,
        transformer: Transformer,
        inputs: Inputs,
        *,
        modulation_ahead: bool,
        trim: Trim = Trim.NEVER,
        blocks: BlockRunner = _AS_THEY_STAND,
    ) -> None:
        self._transformer, self._inputs, self._blocks = transformer, inputs, blocks
        self.trims = trim is Trim.ALWAYS
        self._trims_full = None if trim is Trim.WHERE_EQUAL else self.trims
        self._ahead = Ahead.of(transformer, inputs.conditions) if modulation_ahead else None
        self._text = transformer.context_embedder(inputs.prompt.sequence)  # [1, L, D]
        positions = torch.cat([inputs.prompt.ids, inputs.output_ids, inputs.reference.ids])  # [L + N + M, 3]
        self._rotary: Rotary = transformer.pos_embed(positions)
        first, end = len(inputs.prompt.ids), self._output_end()
        cosine, sine = (angles[first:end].clone() for angles in self._rotary)  # the compiler would tell views apart
        self._of_output = cosine, sine

    def full(self, step: int, latents: Tensor, *, keep: bool = False) -> tuple[Tensor, Kept | None]:
        tokens = torch.cat([latents, self._inputs.reference.latents], dim=1)  # [1, N + M, C]
        velocity, made = self._run(step, tokens, self._rotary, None, self._output_end() if keep else None)
        return velocity[:, : latents.shape[1]], Kept(made) if keep else None

    def cached(self, step: int, latents: Tensor, kept: Kept) -> Tensor:
        cosine, sine = self._rotary
        end = self._output_end()
        return self._run(step, latents, (cosine[:end], sine[:end]), kept, None)[0]

    def _run(
        self, step: int, latents: Tensor, rotary: Rotary, kept: Kept | None, keep_from: int | None
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Through all blocks; the velocity of the output's tokens first, and the keys from position `keep_from` on."""
        transformer, modulation, made = self._transformer, self._modulation(step), []
        looked_at = iter(kept.blocks) if kept is not None else None
        image, text = transformer.x_embedder(latents), self._text
        for index, block in enumerate(transformer.transformer_blocks):
            others = next(looked_at) if looked_at else None
            image, text, keys = self._blocks.double(block, image, text, *modulation.double(index), rotary, others)
            if keep_from is not None:
                made.append(keys.tail(keep_from))
        *singles, last = transformer.single_transformer_blocks
        tokens = torch.cat([text, image], dim=1)
        for index, block in enumerate(singles):
            others = next(looked_at) if looked_at else None
            tokens, keys = self._blocks.single(block, tokens, modulation.single(index), rotary, others)
            if keep_from is not None:
                made.append(keys.tail(keep_from))
        others = next(looked_at) if looked_at else None
        given = last, tokens, modulation.single(len(singles)), rotary, others
        velocity, keys = self._last(given, modulation.out(), is_full=kept is None)
        if keep_from is not None:
            made.append(keys.tail(keep_from))
        return velocity, tuple(made)

    def _last(self, given: Given, out: Tensor, *, is_full: bool) -> tuple[Tensor, KeyValue]:
        """Through the last block and out: of all image tokens, or of the output's alone."""
        text_tokens, output_tokens = self._text.shape[1], len(self._of_output[0])
        if self._trims_full if is_full else self.trims:
            output, keys = self._blocks.last_single(*given, text_tokens, self._of_output)
            return self._out(output, out), keys
        tokens, keys = self._blocks.single(*given)
        velocity = self._out(tokens[:, text_tokens:], out)
        if is_full and self._trims_full is None:
            output, _ = self._blocks.last_single(*given, text_tokens, self._of_output)
            self._trims_full = torch.equal(self._out(output, out), velocity[:, :output_tokens])
        return velocity, keys

    def _out(self, image: Tensor, modulation: Tensor) -> Tensor:
        normed = modulated(self._transformer.norm_out.norm(image), *parts(modulation, 2))
        velocity: Tensor = self._transformer.proj_out(normed)
        return velocity

    def _modulation(self, step: int) -> Modulation:
        if self._ahead is not None:
            return self._ahead.at(step)
        return InTheLoop(self._transformer, self._inputs.conditions.embed(self._transformer, step, step + 1))

    def _output_end(self) -> int:
        """The position after the last output token; there the reference begins."""
        return len(self._inputs.prompt.ids) + len(self._inputs.output_ids)


class Stock:
    """Through diffusers' own `forward`, for weights that stream through the device: it drives their hooks.

    It keeps nothing. Such a step waits for its weights, so that fewer tokens would gain little.
    """

    keeps = trims = False

    def __init__(self, transformer: Transformer, inputs: Inputs) -> None:
        self._transformer, self._inputs = transformer, inputs
        self._ids = torch.cat([inputs.output_ids, inputs.reference.ids])  # [N + M, 3]

    def full(self, step: int, latents: Tensor, *, keep: bool = False) -> tuple[Tensor, Kept | None]:
        if keep:
            raise ValueError("this forward pass keeps no keys and values; plan its steps without a reference kept.")
        prompt, conditions = self._inputs.prompt, self._inputs.conditions
        velocity = self._transformer(
            hidden_states=torch.cat([latents, self._inputs.reference.latents], dim=1),
            timestep=conditions.times[step : step + 1],
            guidance=conditions.guidance,
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.sequence,
            txt_ids=prompt.ids,
            img_ids=self._ids,
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]], None

    def cached(self, step: int, latents: Tensor, kept: Kept) -> Tensor:
        raise ValueError("this forward pass keeps no keys and values; plan its steps without a reference kept.")
