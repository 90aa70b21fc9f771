"""An experiment: skipped steps forecast the last block's features, not the velocity. Knows the written-out forward.

The last norm and the projection then run at every step, with that step's own modulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from acceleration.cases import STEPS, Case
from acceleration.ways import Made, Own, shape
from kontextd_models.acceleration.cost import share
from kontextd_models.acceleration.forecast import Forecast
from kontextd_models.acceleration.planning import Plan
from kontextd_models.acceleration.preset import Preset, StepKind
from kontextd_models.denoise import Trajectory, decode, draw_noise
from kontextd_models.encode import encode_prompt, encode_reference, max_prompt_tokens
from kontextd_models.engine import Engine
from kontextd_models.transformer.forward import WrittenOut
from kontextd_models.transformer.modulation import Transformer, modulated, parts
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """A row of a preset whose forecast is one of features."""

    name: str
    preset: Preset
    group: str = "features forecast"

    @property
    def key(self) -> str:
        return f"features {Own('', '', self.preset).key}"

    @torch.no_grad()
    def edit(self, engine: Engine, case: Case) -> Made:
        model, request, size = engine.model, case.request, case.before.size
        pipeline, device = model.pipeline, model.device
        prompt = encode_prompt(pipeline, case.prompt, max_prompt_tokens(pipeline), device)
        reference = encode_reference(pipeline, case.before, model.dtype, device)
        trajectory = Trajectory.of(model, prompt, reference, size, STEPS, request.guidance_scale, self.preset)
        noise = draw_noise(pipeline, case.seed, *size, model.dtype, device)
        latents = denoised(trajectory, pipeline.transformer, noise, self.preset.forecast_order)
        kinds = trajectory.plan.kinds
        computed = STEPS - kinds.count(StepKind.SKIPPED)
        return Made(decode(pipeline, latents, *size), computed, share(shape(engine, case), kinds))


def experiments() -> Iterator[Features]:
    for computed, prefix in ((12, 4), (9, 2)):
        for order in (0, 1):
            row = Preset(computed=computed / STEPS, prefix=prefix, forecast_order=order)
            yield Features(f"{computed} of 30, first {prefix}, order {order}", row)


def denoised(trajectory: Trajectory, transformer: Transformer, noise: Tensor, order: int) -> Tensor:
    """From `noise` [1, N, C] to packed latents [1, N, C], through steps that run in full or not at all."""
    forward, sigmas, latents = trajectory.forward, trajectory.schedule.sigmas, noise
    assert isinstance(forward, WrittenOut)
    assert only_full(trajectory.plan)
    features, scheduler = Forecast(order), trajectory.schedule.scheduler
    for step, timestep in enumerate(scheduler.timesteps):
        if trajectory.plan.kinds[step] is StepKind.SKIPPED:
            modulation = parts(forward._modulation(step).out(), 2)
            expected = features.at(sigmas[step])
            velocity = transformer.proj_out(modulated(transformer.norm_out.norm(expected), *modulation))
        else:
            with seen_by(transformer.norm_out.norm) as seen:
                velocity = forward.full(step, latents)[0]
            features.learn(sigmas[step], seen[0][:, : latents.shape[1]])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def only_full(plan: Plan) -> bool:
    return set(plan.kinds) <= {StepKind.FULL, StepKind.SKIPPED}


@contextmanager
def seen_by(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module in the meantime."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
