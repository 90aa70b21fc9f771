"""Runs blocks by the fastest way that works, and falls back loudly. Knows ways and errors; knows no steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kontextd_models import memory
from kontextd_models.encode import Pipeline, max_prompt_tokens
from kontextd_models.execution.attention_backends import Shape, choose
from kontextd_models.execution.compilation import compiled, keep_compiled_in
from kontextd_models.execution.planning import ExecutionPlan
from kontextd_models.out_of_memory import is_out_of_memory
from kontextd_models.transformer.attention import KeyValue, Rotary, native
from kontextd_models.transformer.block_ops import BlockOps
from kontextd_models.transformer.blocks import (
    FORMULAS,
    Double,
    LastSingle,
    Single,
    double_block,
    last_single_block,
    single_block,
)
from kontextd_models.transformer.modulation import Block, Transformer

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Way:
    """A way to run the kinds of block; `name` is for people."""

    name: str
    double: Double
    single: Single
    last_single: LastSingle

    @classmethod
    def eager(cls, name: str, ops: BlockOps) -> Way:
        return cls(
            name, partial(double_block, ops=ops), partial(single_block, ops=ops), partial(last_single_block, ops=ops)
        )


class Blocks:
    """The first of its ways; one that fails is given up for good, with a note, and the next one does its work again.

    A block changes none of its inputs. Running out of memory is no failure of a way, and the last way's are the
    caller's.
    """

    def __init__(
        self, ways: Sequence[Way], notes: Sequence[str] = (), free_bytes: Callable[[], int] | None = None
    ) -> None:
        """`free_bytes`: what is free on a CUDA device, for errors that leave open whether it is full."""
        self._ways, self.notes, self._free_bytes = tuple(ways), tuple(notes), free_bytes

    @property
    def way(self) -> str:
        """What runs now."""
        return self._ways[0].name

    @property
    def is_plain(self) -> bool:
        """Whether that is diffusers' own way, to the bit."""
        return self._ways[0] is NATIVE_WAY

    def double(
        self,
        block: Block,
        image: Tensor,
        text: Tensor,
        image_modulation: Tensor,
        text_modulation: Tensor,
        rotary: Rotary,
        kept: KeyValue | None,
    ) -> tuple[Tensor, Tensor, KeyValue]:
        return self._run(lambda way: way.double(block, image, text, image_modulation, text_modulation, rotary, kept))

    def single(
        self, block: Block, tokens: Tensor, modulation: Tensor, rotary: Rotary, kept: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        return self._run(lambda way: way.single(block, tokens, modulation, rotary, kept))

    def last_single(
        self,
        block: Block,
        tokens: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        kept: KeyValue | None,
        text_tokens: int,
        of_output: Rotary,
    ) -> tuple[Tensor, KeyValue]:
        given = block, tokens, modulation, rotary, kept, text_tokens, of_output
        return self._run(lambda way: way.last_single(*given))

    def _run(self, run: Callable[[Way], _Result]) -> _Result:
        while True:
            try:
                return run(self._ways[0])
            except Exception as error:  # of torch's compiler, of a backend's own: they promise no set of classes
                if len(self._ways) == 1 or is_out_of_memory(error, self._free_bytes):
                    raise
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        failed, following = self._ways[:2]
        why = f"{type(error).__name__}: {_gist(error)}"
        note = f"blocks that run {failed.name} failed ({why}); from now on they run {following.name}."
        log.warning("%s", note, exc_info=error)
        self._ways, self.notes = self._ways[1:], (*self.notes, note)


def _gist(error: Exception) -> str:
    """The first lines of what an error says: the compiler's has its own first, and the cause after it."""
    return " ".join(filter(None, str(error).splitlines()[:3]))


NATIVE_WAY = Way.eager("uncompiled with native attention", FORMULAS)
NATIVE = Blocks((NATIVE_WAY,))


def open_blocks(
    plan: ExecutionPlan,
    pipeline: Pipeline,
    device: torch.device,
    dtype: torch.dtype,
    image_tokens: int,
    compile_cache: Path | None,
) -> Blocks:
    """The ways of a plan for a loaded transformer, tried and compiled for `image_tokens` of output and of reference."""
    config, text_tokens = pipeline.transformer.config, max_prompt_tokens(pipeline)
    heads, width = config.num_attention_heads, config.attention_head_dim
    shape = Shape(heads, width, text_tokens + image_tokens, text_tokens + 2 * image_tokens)
    backend = choose(plan.attention, shape, device, dtype)
    ops, ways = BlockOps(backend.dot_product), [NATIVE_WAY]
    if backend.dot_product is not native:
        ways.insert(0, Way.eager(f"uncompiled with {backend.name} attention", ops))
    if plan.compiled:
        if compile_cache is not None:
            keep_compiled_in(compile_cache)
        ways.insert(0, Way(f"compiled with {backend.name} attention", *compiled(ops)))
    blocks = Blocks(ways, backend.notes, partial(memory.free_bytes, device))
    if plan.compiled:
        _compile_now(blocks, pipeline.transformer, text_tokens, image_tokens, device, dtype)
    log.info("blocks run %s", blocks.way)
    return blocks


def _compile_now(
    blocks: Blocks,
    transformer: Transformer,
    text_tokens: int,
    image_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Run all blocks, with and without keys kept of a reference: no edit waits for the compiler then."""
    config = transformer.config
    heads, head_width = config.num_attention_heads, config.attention_head_dim
    width = heads * head_width

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    kept = KeyValue(*(zeros(1, image_tokens, heads, head_width) for _ in range(2)))
    for seen, others in ((2 * image_tokens, None), (image_tokens, kept)):
        # No tensor twice: the compiler would take it for granted.
        cosine, sine = (torch.zeros(text_tokens + seen, head_width, device=device) for _ in range(2))
        of_output = (torch.zeros_like(cosine[:image_tokens]), torch.zeros_like(sine[:image_tokens]))
        image, text = zeros(1, seen, width), zeros(1, text_tokens, width)
        for block in transformer.transformer_blocks:
            blocks.double(block, image, text, zeros(1, 6 * width), zeros(1, 6 * width), (cosine, sine), others)
        tokens = zeros(1, text_tokens + seen, width)
        *singles, last = transformer.single_transformer_blocks
        for block in singles:
            blocks.single(block, tokens, zeros(1, 3 * width), (cosine, sine), others)
        blocks.last_single(last, tokens, zeros(1, 3 * width), (cosine, sine), others, text_tokens, of_output)
