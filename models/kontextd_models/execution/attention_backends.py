"""Chooses how attention is computed on a GPU, by trying. Knows queries, keys and values; knows no blocks, no models.

| name | what it is |
|---|---|
| `fa3` | FlashAttention 3, where its package `flash_attn_interface` is installed; nothing is downloaded |
| `cudnn` | cuDNN's attention, in torch |
| `flash` | FlashAttention 2, in torch |
| `native` | what torch chooses for `scaled_dot_product_attention`: the only one that is diffusers' to the bit |

A backend is a function, handed to whoever calls it: no switch of the process is set. Each is compared with the formula
on a small shape and then timed on the model's own; of those that are right the fastest is taken.
"""

from __future__ import annotations

import functools
import importlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kontextd_models.out_of_memory import is_out_of_memory
from kontextd_models.transformer.attention import DotProduct, native

log = logging.getLogger(__name__)

_FA3 = "flash_attn_interface"
# Of the largest value: weights of the softmax are rounded to bfloat16, and so is the result, half a unit of 2⁻⁸ each.
_TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-14}
_SMALL_QUERIES, _SMALL_KEYS = 130, 257  # no multiples of any tile
_RUNS, _WARM_UP_RUNS = 7, 3


@dataclass(frozen=True)
class Shape:
    """Of one attention: heads, their width, and tokens."""

    heads: int
    width: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Backend:
    """`notes` tell of a backend that was asked for and cannot be had."""

    name: str
    dot_product: DotProduct
    notes: tuple[str, ...] = ()


NATIVE = Backend("native", native)


def choose(asked: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for "auto" the fastest that is right; `native` where that cannot be had."""
    if asked == NATIVE.name:
        return NATIVE
    seconds: dict[str, float] = {}
    usable: dict[str, DotProduct] = {}
    faults: dict[str, str] = {}
    for name, make in CANDIDATES.items():
        if asked not in ("auto", name):
            continue
        try:
            dot_product = make()
            off = error_of(dot_product, shape, device, dtype)
            if not off <= 1:  # NaN is wrong too
                faults[name] = f"its results are off by {off:.2g} times what is allowed"
                continue
            usable[name], seconds[name] = dot_product, seconds_of(dot_product, shape, device, dtype)
        except Exception as error:  # whatever a package or a kernel fails with
            if is_out_of_memory(error):
                raise
            faults[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return _chosen(asked, usable, seconds, faults)


def error_of(dot_product: DotProduct, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error against the formula in float32, in units of what is allowed."""
    query, key, value = _random(Shape(shape.heads, shape.width, _SMALL_QUERIES, _SMALL_KEYS), device, dtype)
    scores = query.float() @ key.float().transpose(-1, -2) * shape.width**-0.5
    exact = scores.softmax(dim=-1) @ value.float()
    error = (dot_product(query, key, value).float() - exact).abs().max()
    return float(error / (_TOLERANCE[dtype] * value.float().abs().max()))


def seconds_of(dot_product: DotProduct, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """The median of several runs."""
    given = _random(shape, device, dtype)
    return statistics.median([_timed(dot_product, given, device) for _ in range(_WARM_UP_RUNS + _RUNS)][_WARM_UP_RUNS:])


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Given its own layout: with others its results were wrong for diffusers, which copies likewise."""
    given = (heads.contiguous() for heads in (query, key, value))
    mixed: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, None, False)[0]
    return mixed


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return mixed


@functools.cache  # an op can be registered once
def fa3() -> DotProduct:
    """As an op of torch, so that the compiler does not look inside. Raises `ImportError` where it is not installed."""
    flash_attn_func = importlib.import_module(_FA3).flash_attn_func

    @torch.library.custom_op("kontextd::fa3", mutates_args=())
    def of_tokens(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = flash_attn_func(query, key, value)  # [1, L, heads, width] each
        mixed: Tensor = found[0] if isinstance(found, tuple) else found  # older ones give sums of exponentials too
        return mixed

    @of_tokens.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    def of_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed: Tensor = of_tokens(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return mixed.transpose(1, 2)

    return of_heads


CANDIDATES: Mapping[str, Callable[[], DotProduct]] = {
    "native": lambda: native,
    "fa3": fa3,
    "cudnn": lambda: cudnn,
    "flash": lambda: flash,
}


def _chosen(
    asked: str, usable: Mapping[str, DotProduct], seconds: Mapping[str, float], faults: Mapping[str, str]
) -> Backend:
    for name, fault in faults.items():
        log.info("attention %s cannot be used here: %s", name, fault)
    if not usable:
        note = (
            f"attention {asked} was asked for, and {faults.get(asked, 'none can be used here')}; native runs instead."
        )
        log.warning("%s", note)
        return Backend(NATIVE.name, native, (note,))
    fastest = min(seconds, key=seconds.__getitem__)
    told = ", ".join(f"{name} {taken * 1e3:.2f} ms" for name, taken in sorted(seconds.items(), key=lambda one: one[1]))
    log.info("attention %s of %s", fastest, told)
    return Backend(fastest, usable[fastest])


def _random(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as blocks hand them over: [1, heads, L, width], with the tokens outermost in memory."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int) -> Tensor:
        heads = torch.randn(1, tokens, shape.heads, shape.width, generator=generator, device=device)
        return heads.to(dtype).transpose(1, 2)

    return draw(shape.queries), draw(shape.keys), draw(shape.keys)


def _timed(dot_product: DotProduct, given: tuple[Tensor, Tensor, Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    dot_product(*given).permute(0, 2, 1, 3).flatten(2, 3)  # as `attend` has it: not every layout does that for nothing
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
