"""What a step costs, in FLOPs: pure arithmetic over sizes. Knows layers, tokens and kinds of steps; knows no torch.

A product of [m, k] and [k, n] is 2 · m · k · n FLOPs (a multiplication and an addition), as torch's `FlopCounterMode`
counts; norms, activations and rotations are left out, there as here. Of D hidden channels, L text, N output and M
reference tokens, a block takes

    24 · D² · T + 4 · D · Q · K

with T = Q = K = L + N + M where every token runs, and T = Q = L + N, K = L + N + M where the reference is kept: in both
kinds of block the projections hold 12 · D² weights a token (Q, K, V and output 4 · D², the MLP of ratio 4 another
8 · D²), and attention is two products over Q · K · D. FLUX.1's sizes are those of its transformer's `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kontextd_models.acceleration.planning import Plan
from kontextd_models.acceleration.preset import StepKind

_TIME_CHANNELS = 256  # sinusoids of timestep and guidance (diffusers' CombinedTimestepGuidanceTextProjEmbeddings)


@dataclass(frozen=True)
class Shape:
    """A transformer and the tokens of a request. The defaults are FLUX.1 Kontext [dev], 1 MP from 1 MP."""

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_width: int = 128
    channels: int = 64  # of a token in latent space, 2 × 2 × 16
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True  # whether guidance is embedded
    output_tokens: int = 4096
    reference_tokens: int = 4096
    text_tokens: int = 512

    @classmethod
    def of(cls, config: Mapping[str, Any], output_tokens: int, reference_tokens: int, text_tokens: int) -> Shape:
        """From the configuration of a FluxTransformer2DModel. Any: each key has a type of its own."""
        return cls(
            double_blocks=config["num_layers"],
            single_blocks=config["num_single_layers"],
            heads=config["num_attention_heads"],
            head_width=config["attention_head_dim"],
            channels=config["in_channels"],
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            guidance=config["guidance_embeds"],
            output_tokens=output_tokens,
            reference_tokens=reference_tokens,
            text_tokens=text_tokens,
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def blocks(self) -> int:
        return self.double_blocks + self.single_blocks


def step_flops(shape: Shape, kind: StepKind, *, trimmed: bool = False) -> int:
    """Of one step, without what `shared_flops` counts. `trimmed`: the last block, to the N tokens of the output.

    It makes keys and values (4 · D²) of all T, and the other 20 · D² and the queries of N; the way out is of N too.
    """
    if kind is StepKind.SKIPPED:
        return 0
    keys = shape.text_tokens + shape.output_tokens + shape.reference_tokens
    kept = shape.reference_tokens if kind is StepKind.CACHED else 0
    run, width = keys - kept, shape.width
    of_last, out = (shape.output_tokens,) * 2 if trimmed else (run, run - shape.text_tokens)
    whole = (shape.blocks - 1) * (24 * width**2 * run + 4 * width * run * keys)
    last = 4 * width**2 * run + 20 * width**2 * of_last + 4 * width * of_last * keys
    ends = 2 * (run - shape.text_tokens + out) * shape.channels * width  # into the image's tokens and out of them
    return whole + last + ends


def shared_flops(shape: Shape, steps: int) -> int:
    """Of what is the same whatever the kinds of the steps: the text's embedding once, and the modulation of each step.

    A double block has 12 vectors of modulation, a single one 3, the last norm 2.
    """
    width = shape.width
    sinusoids = (1 + shape.guidance) * (_TIME_CHANNELS + width)
    embedding = width * (sinusoids + shape.pooled_width + width)
    modulation = (12 * shape.double_blocks + 3 * shape.single_blocks + 2) * width**2
    return 2 * shape.text_tokens * shape.text_width * width + 2 * steps * (embedding + modulation)


def plan_flops(shape: Shape, kinds: Sequence[StepKind], *, trimmed: bool = False) -> int:
    """Of all steps of one image, modulation of the skipped ones too: it is made ahead, and a 25,000th of a step."""
    return shared_flops(shape, len(kinds)) + sum(step_flops(shape, kind, trimmed=trimmed) for kind in kinds)


def share(shape: Shape, kinds: Sequence[StepKind], *, trimmed: bool = False) -> float:
    """Of the FLOPs of as many steps in full, their last block whole: 0 to 1."""
    return plan_flops(shape, kinds, trimmed=trimmed) / plan_flops(shape, [StepKind.FULL] * len(kinds))


def at_most(plan: Plan) -> tuple[StepKind, ...]:
    """The kinds where the plan's guard spends all of its extra steps: as the plan's own without one.

    Which of those that it may run they are makes no difference to the cost; here the first ones.
    """
    extra = StepKind.CACHED if plan.reuses_reference else StepKind.FULL
    ran_too = plan.may_run_too[: plan.extra_steps_at_most]
    return tuple(extra if step in ran_too else kind for step, kind in enumerate(plan.kinds))
