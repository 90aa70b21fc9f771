"""The blocks' functions compiled, each once for a whole model. Knows torch's compiler; knows no presets and no steps.

One graph for each function, with and without keys kept of the reference: it takes its weights from the module it is
given, so that all blocks share it, and weights written in place need no other. Numbers of tokens are left open, so that
no size compiles anew, and nothing is padded. What was compiled is kept in a folder for the next start (torch's FX graph
cache and Triton's), which whoever can write there can make run: it belongs to the service alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from kontextd_models.transformer.attention import KeyValue, Rotary
from kontextd_models.transformer.block_ops import BlockOps
from kontextd_models.transformer.blocks import Double, LastSingle, Single, double_block, last_single_block, single_block
from kontextd_models.transformer.modulation import Block


def compiled(ops: BlockOps, backend: str = "inductor") -> tuple[Double, Single, LastSingle]:
    """The three functions; they compile when they are first called."""
    of_double = torch.compile(double_block, fullgraph=True, backend=backend)
    of_single = torch.compile(single_block, fullgraph=True, backend=backend)
    of_last = torch.compile(last_single_block, fullgraph=True, backend=backend)

    def double(
        block: Block,
        image: Tensor,
        text: Tensor,
        image_modulation: Tensor,
        text_modulation: Tensor,
        rotary: Rotary,
        kept: KeyValue | None,
    ) -> tuple[Tensor, Tensor, KeyValue]:
        _leave_open(image, rotary, kept)
        return of_double(block, image, text, image_modulation, text_modulation, rotary, kept, ops)

    def single(
        block: Block, tokens: Tensor, modulation: Tensor, rotary: Rotary, kept: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        _leave_open(tokens, rotary, kept)
        return of_single(block, tokens, modulation, rotary, kept, ops)

    def last_single(
        block: Block,
        tokens: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        kept: KeyValue | None,
        text_tokens: int,
        of_output: Rotary,
    ) -> tuple[Tensor, KeyValue]:
        _leave_open(tokens, (*rotary, *of_output), kept)
        return of_last(block, tokens, modulation, rotary, kept, text_tokens, of_output, ops)

    return double, single, last_single


def keep_compiled_in(folder: Path) -> None:
    """Torch reads the variable whenever it looks for what it compiled; Triton's cache lies below."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _leave_open(tokens: Tensor, angles: tuple[Tensor, ...], kept: KeyValue | None) -> None:
    """Tell the compiler which sizes are numbers of tokens. It would take those of the first call for constants."""
    torch._dynamo.mark_dynamic(tokens, 1)
    for each in angles:
        torch._dynamo.mark_dynamic(each, 0)
    for tensor in kept or ():
        torch._dynamo.mark_dynamic(tensor, 1)
