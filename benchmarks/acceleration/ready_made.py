"""The caches that come ready-made, in diffusers and in cache-dit, on the stock pipeline. Knows nothing of our presets.

The stock Kontext pipeline never enters `cache_context`, without which diffusers' hooks raise; and what an edit leaves
in them is seen by the next one unless it is reset. cache-dit is no dependency: without it its rows are left out.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any

import torch
from acceleration.cases import STEPS, Case
from acceleration.ways import Made
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from kontextd_models.engine import Engine
from kontextd_models.stock import StockEdit, stock_picture
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Cached = Callable[[Engine, Case], AbstractContextManager[None]]
Shape = tuple[int, ...]

NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class ReadyMade:
    """A cache with its settings; `cached` has it on the pipeline for a while."""

    group: str
    name: str
    cached: Cached

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    def edit(self, engine: Engine, case: Case) -> Made:
        whole, rest = _counts_without(engine, case)
        with self.cached(engine, case), _calls(_last_projection(engine)) as calls:
            picture, flops = _counted(engine, case)
        return Made(picture, len(calls), (flops - rest) / (whole - rest))


def ready_made() -> Iterator[ReadyMade]:
    """With settings that compute about half and about a third of the steps."""
    for threshold in (0.08, 0.15):
        first_block = partial(_by_diffusers, FirstBlockCacheConfig(threshold))
        yield ReadyMade("FirstBlockCache", f"threshold {threshold:g}", first_block)
    for what, interval in (("attention", 2), ("output", 2), ("output", 4)):
        taylor = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=4,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=what == "output",
        )
        name = f"{what} forecast, 1 step in {interval}, first 4, order 1"
        yield ReadyMade("TaylorSeer", name, partial(_by_diffusers, taylor))
    for threshold, most in ((0.1, 2), (0.4, 4)):
        cached = partial(_by_mag_cache, threshold, most)
        yield ReadyMade("MagCache", f"threshold {threshold:g}, at most {most} in a row, calibrated", cached)
    if cache_dit_version() != NOT_INSTALLED:
        yield from _of_cache_dit()


def _of_cache_dit() -> Iterator[ReadyMade]:
    for threshold, order in ((0.08, None), (0.08, 1), (0.15, None), (0.15, 1)):
        dynamic = {"residual_diff_threshold": threshold, "max_warmup_steps": 4}
        name = f"threshold {threshold:g}, first 4, {_ordered(order)}"
        yield ReadyMade("cache-dit DBCache", name, partial(_by_cache_dit, dynamic, order))
    for policy, order in (("medium", 1), ("fast", None), ("fast", 1), ("ultra", 1)):
        static = {"policy": policy}
        yield ReadyMade("cache-dit mask", f"{policy}, {_ordered(order)}", partial(_by_cache_dit, static, order))


def cache_dit_version() -> str:
    try:
        return version("cache-dit")
    except PackageNotFoundError:
        return NOT_INSTALLED


def _ordered(order: int | None) -> str:
    return "reused" if order is None else f"order {order}"


@contextmanager
def _by_diffusers(settings: Any, engine: Engine, _: Case) -> Iterator[None]:  # Any: the configurations share no class
    transformer = engine.model.pipeline.transformer
    transformer.enable_cache(settings)
    try:
        transformer._reset_stateful_cache()
        with transformer.cache_context("cond"):
            yield
    finally:
        transformer.disable_cache()


@contextmanager
def _by_mag_cache(threshold: float, most: int, engine: Engine, case: Case) -> Iterator[None]:
    settings = MagCacheConfig(threshold, most, num_inference_steps=STEPS, mag_ratios=_ratios(engine, case))
    with _by_diffusers(settings, engine, case):
        yield


_RATIOS: list[float] = []


def _ratios(engine: Engine, case: Case) -> list[float]:
    """Of this model, from the first edit that asks: MagCache prints them and keeps them nowhere."""
    if not _RATIOS:
        calibrating = MagCacheConfig(num_inference_steps=STEPS, calibrate=True)
        with redirect_stdout(StringIO()) as printed, _by_diffusers(calibrating, engine, case):
            stock_picture(engine.model, _asked(case))
        _RATIOS.extend(ast.literal_eval(printed.getvalue().strip().splitlines()[-1]))
    return _RATIOS


@contextmanager
def _by_cache_dit(settings: dict[str, Any], order: int | None, engine: Engine, _: Case) -> Iterator[None]:
    """Of a model with six blocks only the first one is computed at each step; cache-dit's default is eight."""
    import cache_dit

    given = dict(settings)
    if policy := given.pop("policy", None):
        mask = cache_dit.steps_mask(total_steps=STEPS, mask_policy=policy)
        given |= {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    forecast = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    with _silent():
        cache_dit.enable_cache(
            engine.model.pipeline,
            cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, **given),
            calibrator_config=forecast,
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(engine.model.pipeline)


@contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _asked(case: Case) -> StockEdit:
    request = case.request
    return StockEdit(case.before, case.prompt, *case.before.size, STEPS, request.guidance_scale, case.seed)


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


# torch's counter does not know the CPU's own attention.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _counted(engine: Engine, case: Case) -> tuple[Image.Image, int]:
    """The stock edit and its FLOPs, encoders and autoencoder among them."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        picture = stock_picture(engine.model, _asked(case))
    return picture, counter.get_total_flops()


_WITHOUT: dict[tuple[int, int], tuple[int, int]] = {}


def _counts_without(engine: Engine, case: Case) -> tuple[int, int]:
    """FLOPs of an edit of this size that caches nothing, and what of them is not the transformer's."""
    size = case.before.size
    if size not in _WITHOUT:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            stock_picture(engine.model, _asked(case))
        of_transformer = counter.get_flop_counts()[type(engine.model.pipeline.transformer).__name__]
        total = counter.get_total_flops()
        _WITHOUT[size] = (total, total - sum(of_transformer.values()))
    return _WITHOUT[size]


def _last_projection(engine: Engine) -> torch.nn.Module:
    """A layer in the last block, which runs where a step is computed and nowhere else."""
    projection: torch.nn.Module = engine.model.pipeline.transformer.single_transformer_blocks[-1].attn.to_q
    return projection


@contextmanager
def _calls(module: torch.nn.Module) -> Iterator[list[None]]:
    """One entry a call."""
    calls: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
