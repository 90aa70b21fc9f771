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
from kontextd_models.execution.attention_backends import Backend, Shape, choose
from kontextd_models.execution.compilation import compiled, keep_compiled_in
from kontextd_models.execution.fp8_ops import Fp8Ops
from kontextd_models.execution.kernel_ops import KernelOps
from kontextd_models.execution.planning import ExecutionPlan
from kontextd_models.execution.trial import Trial
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
from kontextd_models.transformer.modulation import Block

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_FASTER = 0.98  # what is as fast but for noise is not taken: two starts of a box are to run alike


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
        self,
        ways: Sequence[Way],
        notes: Sequence[str] = (),
        free_bytes: Callable[[], int] | None = None,
        tried: Sequence[str] = (),
    ) -> None:
        """`free_bytes`: what is free on a CUDA device, for errors that leave open whether it is full.

        `tried` is how ways compared that were tried beside these, for people.
        """
        self._ways, self.notes, self._free_bytes = tuple(ways), tuple(notes), free_bytes
        self.tried = tuple(tried)
        self.has_failed = False

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

    def having_tried(self, way: Way, trial: Trial) -> Blocks:
        """The same, behind another way if that is right and clearly faster.

        One that is wrong or fails is no reason not to serve: it leaves a note, as a way does that fails later.
        """
        try:
            trial.run(way)
            error = trial.error(way, self)
            if not error <= 1:  # NaN is wrong too
                return self._refusing(f"blocks {way.name} are off by {error:.2g} times what is allowed, and not used.")
            seconds, others_s = trial.seconds(way, self)
        except Exception as failure:  # of torch's compiler, of Triton's: they promise no set of classes
            if is_out_of_memory(failure, self._free_bytes):
                raise
            return self._refusing(f"blocks {way.name} failed and are not used: {_gist(failure)}", failure)
        told = f"blocks {way.name} take {seconds / others_s:.3f} times as long as {self.way}"
        told += f", and are off by {error:.2g} times what is allowed"
        log.info("%s", told)
        ways = (way, *self._ways) if seconds < _FASTER * others_s else self._ways
        return Blocks(ways, self.notes, self._free_bytes, (*self.tried, told))

    def _refusing(self, why: str, failure: Exception | None = None) -> Blocks:
        log.warning("%s", why, exc_info=failure)
        return Blocks(self._ways, (*self.notes, why), self._free_bytes, self.tried)

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
        self._ways, self.notes, self.has_failed = self._ways[1:], (*self.notes, note), True


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
    blocks = Blocks(_ways(plan, backend), backend.notes, partial(memory.free_bytes, device))
    if plan.compiled:
        if compile_cache is not None:
            keep_compiled_in(compile_cache)
        trial = Trial(pipeline.transformer, text_tokens, image_tokens, device, dtype, plan.fp8)
        trial.run(blocks)  # no edit waits for the compiler then
        if plan.kernels == "auto" and not blocks.has_failed:
            blocks = blocks.having_tried(_compiled(backend, KernelOps), trial)
    log.info("blocks run %s", blocks.way)
    return blocks


def _ways(plan: ExecutionPlan, backend: Backend) -> list[Way]:
    """Those that are known to be wanted, the best first."""
    formulas = _formulas(plan)
    kinds = (KernelOps, formulas) if plan.kernels == "on" else (formulas,)
    ways = [_compiled(backend, kinds[0])] if plan.compiled else []
    ways += [Way.eager(_name("uncompiled", backend, kind), kind(backend.dot_product)) for kind in kinds]
    is_native = backend.dot_product is native
    return [*ways[:-1], NATIVE_WAY] if is_native else [*ways, NATIVE_WAY]


def _formulas(plan: ExecutionPlan) -> type[BlockOps]:
    return Fp8Ops if plan.fp8 else BlockOps


def _compiled(backend: Backend, kind: type[BlockOps]) -> Way:
    return Way(_name("compiled", backend, kind), *compiled(kind(backend.dot_product)))


def _name(how: str, backend: Backend, kind: type[BlockOps]) -> str:
    return f"{how} with {backend.name} attention" + (" and kernels" if kind is KernelOps else "")
