"""Our own ways through the steps of an edit: rows of presets, one mechanism at a time. Knows the engine's door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from acceleration.cases import STEPS, Case
from kontextd_models import Acceleration, Done, EditRequest
from kontextd_models.acceleration.cost import Shape, share
from kontextd_models.acceleration.preset import Guard, Preset, StepKind
from kontextd_models.acceleration.table import SHIPPED, PresetTable, read_table, row_as_json
from kontextd_models.encode import max_prompt_tokens
from kontextd_models.engine import Engine
from PIL import Image

PIXELS_A_TOKEN = 16 * 16


@dataclass(frozen=True)
class Made:
    """A result, how many steps ran, and their share of the FLOPs of as many steps in full."""

    picture: Image.Image
    computed: int
    flops: float


class Way(Protocol):
    """`group` and `name` say what it is, `key` all that its results depend on."""

    @property
    def group(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    def edit(self, engine: Engine, case: Case) -> Made:
        """Through the whole edit."""


@dataclass(frozen=True)
class Own:
    """A row of a preset, put in the engine's table."""

    group: str
    name: str
    preset: Preset

    @property
    def key(self) -> str:
        return json.dumps(row_as_json(replace(self.preset, summary="")), sort_keys=True)

    def edit(self, engine: Engine, case: Case) -> Made:
        done = done_with(engine, case.request, self.preset)
        used = done.preset
        kinds = [StepKind.FULL] * used.full + [StepKind.CACHED] * used.cached + [StepKind.SKIPPED] * used.skipped
        return Made(
            done.images[0],
            used.full + used.cached,
            share(shape(engine, case), kinds, trimmed=self.preset.trim_last_block),
        )


NONE = Own("preset", "none", Preset())
EXACT = (
    Own("exact", "modulation ahead of the loop", Preset(modulation_ahead=True)),
    Own("exact", "last block trimmed", Preset(trim_last_block=True)),
)


def done_with(engine: Engine, request: EditRequest, preset: Preset) -> Done:
    """By a row that stands in the place of `none`."""
    engine.presets = PresetTable({**engine.model.presets.rows, Acceleration.NONE: preset}, Path())
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def shape(engine: Engine, case: Case) -> Shape:
    """The embedded model and the tokens of this edit, where output and reference have one size."""
    tokens = case.before.width * case.before.height // PIXELS_A_TOKEN
    return Shape.of(engine.model.pipeline.transformer.config, tokens, tokens, max_prompt_tokens(engine.model.pipeline))


def presets(engine: Engine) -> list[Own]:
    """The model's own rows but `none`."""
    rows = engine.model.presets.rows
    return [Own("preset", name.value, rows[name]) for name in (Acceleration.REGULAR, Acceleration.HIGH)]


def mechanisms() -> Iterator[Own]:
    """Each mechanism by itself, in one setting. What leaves nothing out (`EXACT`) changes roundings at most."""
    yield skipping(12, 2)
    yield reference_kept(2)
    yield guarded(0.02)


def settings() -> Iterator[Own]:
    """The mechanisms in many settings each."""
    yield from EXACT
    for computed in (20, 15, 12):
        yield from (skipping(computed, 4, order) for order in (0, 1))
    for computed, prefix in ((15, 1), (15, 2), (12, 2), (12, 6), (9, 1), (9, 2), (9, 3)):
        yield skipping(computed, prefix)
    yield from (reference_kept(every) for every in (2, 3, 5))
    mask = "FFFF" + "c" * (STEPS - 4)
    yield Own("reference kept", "in full in the first 4 steps only", Preset(masks={STEPS: mask}, reuse_reference=True))
    yield from (guarded(residual) for residual in (None, 0.02, 0.1))
    shipped = read_table(SHIPPED).rows
    for name in (Acceleration.REGULAR, Acceleration.HIGH):
        yield Own("rows of FLUX.1 Kontext", name.value, shipped[name])


def skipping(computed: int, prefix: int, order: int = 1) -> Own:
    """Steps skipped and forecast; those that run, in full."""
    row = Preset(computed=computed / STEPS, prefix=prefix, forecast_order=order)
    return Own("skipping", f"{computed} of {STEPS}, first {prefix}, order {order}", row)


def reference_kept(every: int) -> Own:
    """Every step runs; the reference's keys and values are those of the last full one."""
    mask = "".join("c" if step % every else "F" for step in range(STEPS))
    row = Preset(masks={STEPS: mask}, reuse_reference=True)
    return Own("reference kept", f"in full every {every} steps", row)


def guarded(residual: float | None) -> Own:
    """Few steps, and two more at most where the forecast is off."""
    guard = None if residual is None else Guard(residual, extra_steps=2)
    told = "no guard" if residual is None else f"2 more at {residual:g}"
    return Own("guard", f"9 of {STEPS}, first 2, {told}", Preset(computed=9 / STEPS, prefix=2, guard=guard))
