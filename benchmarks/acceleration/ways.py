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
    """Each mechanism by itself."""
    yield Own("exact", "modulation ahead of the loop", Preset(modulation_ahead=True))
    yield Own("exact", "last block trimmed", Preset(trim_last_block=True))
    yield from skipping()
    yield from reference_kept()
    unguarded = Preset(computed=9 / STEPS, prefix=2)
    yield Own("guard", "9 of 30, first 2, no guard", unguarded)
    for residual in (0.02, 0.1):
        guard = Guard(residual, extra_steps=2)
        yield Own("guard", f"9 of 30, first 2, 2 more at {residual:g}", replace(unguarded, guard=guard))
    shipped = read_table(SHIPPED).rows
    for name in (Acceleration.REGULAR, Acceleration.HIGH):
        yield Own("rows of FLUX.1 Kontext", name.value, shipped[name])


def skipping() -> Iterator[Own]:
    """Steps skipped and forecast; those that run, in full."""
    for computed in (20, 15, 12):
        for order in (0, 1):
            row = Preset(computed=computed / STEPS, prefix=4, forecast_order=order)
            yield Own("skipping", f"{computed} of 30, first 4, order {order}", row)
    for computed, prefix in ((15, 1), (15, 2), (12, 2), (12, 6), (9, 1), (9, 2), (9, 3)):
        row = Preset(computed=computed / STEPS, prefix=prefix)
        yield Own("skipping", f"{computed} of 30, first {prefix}, order 1", row)


def reference_kept() -> Iterator[Own]:
    """Every step runs; the reference's keys and values are those of the last full one."""
    for every in (2, 3, 5):
        mask = "".join("c" if step % every else "F" for step in range(STEPS))
        yield Own("reference kept", f"in full every {every} steps", Preset(masks={STEPS: mask}, reuse_reference=True))
    mask = "FFFF" + "c" * (STEPS - 4)
    yield Own("reference kept", "in full in the first 4 steps only", Preset(masks={STEPS: mask}, reuse_reference=True))
