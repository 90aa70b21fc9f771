"""The arithmetic of `cost.py` against torch's own counter, and what the shipped rows may cost at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from kontextd_models.acceleration.cost import Shape, at_most, plan_flops, share, shared_flops, step_flops
from kontextd_models.acceleration.planning import Plan, plan
from kontextd_models.acceleration.preset import Guard, StepKind
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.encode import EncodedPrompt, EncodedReference
from kontextd_models.records import Acceleration
from kontextd_models.transformer.forward import Inputs, Trim, WrittenOut
from kontextd_models.transformer.modulation import Conditions
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

FULL = StepKind.FULL
KONTEXT = {"guidance_embeds": True}  # diffusers' defaults are FLUX.1's sizes
SMALL = {
    "num_layers": 1,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
NO_GUIDANCE = SMALL | {"guidance_embeds": False}
STEPS = 3


def counted(work: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def request(config: dict[str, Any], shape: Shape) -> tuple[Any, Inputs]:
    """A transformer without weights, and what a request of `STEPS` steps gives it."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config).to(torch.bfloat16)
    prompt = EncodedPrompt(
        meta(1, shape.text_tokens, shape.text_width), meta(1, shape.pooled_width), meta(shape.text_tokens, 3)
    )
    reference = EncodedReference(meta(1, shape.reference_tokens, shape.channels), meta(shape.reference_tokens, 3))
    conditions = Conditions(meta(STEPS), meta(1) if shape.guidance else None, meta(1, shape.pooled_width))
    return transformer, Inputs(prompt, reference, meta(shape.output_tokens, 3), conditions)


def shape_of(config: dict[str, Any], output: int, reference: int, text: int) -> Shape:
    with torch.device("meta"):
        return Shape.of(FluxTransformer2DModel(**config).config, output, reference, text)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [(KONTEXT, (4096, 4096, 512)), (SMALL, (40, 80, 7)), (NO_GUIDANCE, (48, 30, 7))],
    ids=["Kontext at 1 MP + 1 MP", "small, two references", "without guidance"],
)
def test_every_kind_of_step_costs_what_torch_counts(
    config: dict[str, Any], tokens: tuple[int, int, int], trimmed: bool
) -> None:
    shape = shape_of(config, *tokens)
    transformer, inputs = request(config, shape)
    latents, made = meta(1, shape.output_tokens, shape.channels), []
    trim = Trim.ALWAYS if trimmed else Trim.NEVER
    shared = counted(lambda: made.append(WrittenOut(transformer, inputs, modulation_ahead=True, trim=trim)))
    assert shared_flops(shape, STEPS) == shared
    forward = made[0]
    kept = []
    full = counted(lambda: kept.append(forward.full(0, latents, keep=True)[1]))
    cached = counted(lambda: forward.cached(1, latents, kept[0]))
    assert [step_flops(shape, kind, trimmed=trimmed) for kind in StepKind] == [full, cached, 0]


def test_an_exact_edit_costs_the_same_with_modulation_in_the_loop() -> None:
    shape = shape_of(NO_GUIDANCE, 48, 30, 7)
    transformer, inputs = request(NO_GUIDANCE, shape)
    latents = meta(1, shape.output_tokens, shape.channels)

    def edit() -> None:
        forward = WrittenOut(transformer, inputs, modulation_ahead=False)
        for step in range(STEPS):
            forward.full(step, latents)

    assert plan_flops(shape, [FULL] * STEPS) == counted(edit)


def test_the_defaults_are_kontext_at_a_megapixel() -> None:
    assert Shape() == shape_of(KONTEXT, 4096, 4096, 512)
    assert step_flops(Shape(), FULL) == pytest.approx(165.4e12, rel=0.02)
    assert plan_flops(Shape(), [FULL] * 28) == pytest.approx(4632e12, rel=0.02)


@pytest.mark.parametrize("steps", [28, 30])
@pytest.mark.parametrize(("preset", "limit"), [(Acceleration.REGULAR, 0.45), (Acceleration.HIGH, 0.27)])
def test_a_shipped_row_costs_at_most_its_share_of_an_exact_edit(preset: Acceleration, limit: float, steps: int) -> None:
    row = read_table(SHIPPED).rows[preset]
    assert share(Shape(), plan(row, steps).kinds, trimmed=row.trim_last_block) <= limit


def test_a_shipped_exact_row_costs_all_of_it() -> None:
    row = plan(read_table(SHIPPED).rows[Acceleration.NONE], 28)
    assert share(Shape(), row.kinds) == 1


@pytest.mark.parametrize(
    ("mask", "extra_steps", "expected"),
    [
        ("Fcc..c..c", 2, "Fccccc..c"),
        ("Fcc..c..c", 3, "Fcccccc.c"),
        ("FFF..F", 9, "FFFFFF"),
        ("Fc..c..c", 2, "Fc..cccc"),  # before the first gap nothing can be held against a forecast
        ("F..F", 9, "F..F"),
    ],
)
def test_a_guard_adds_its_extra_steps_and_no_more(mask: str, extra_steps: int, expected: str) -> None:
    guarded = Plan(tuple(map(StepKind, mask)), 1, Guard(0.1, extra_steps))
    assert "".join(at_most(guarded)) == expected
    assert at_most(Plan(guarded.kinds, 1, None)) == guarded.kinds
