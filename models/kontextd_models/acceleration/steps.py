"""A plan carried out, for one image. Knows forward passes and velocities; knows no presets, no scheduler.

All that a run keeps, keys and values, velocities, what the guard has spent, lives here and goes with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kontextd_models.acceleration.forecast import Forecast
from kontextd_models.acceleration.planning import Plan
from kontextd_models.acceleration.preset import StepKind
from kontextd_models.transformer.forward import Forward, Kept


class Steps:
    """Asked once for each step, in order."""

    def __init__(self, forward: Forward, plan: Plan) -> None:
        self._forward, self._plan, self._kinds = forward, plan, list(plan.kinds)
        self._forecast = Forecast(plan.forecast_order)
        self._kept: Kept | None = None
        self._extra_steps = plan.guard.extra_steps if plan.guard else 0

    def velocity(self, step: int, sigma: float, latents: Tensor) -> tuple[Tensor, StepKind]:
        """The velocity [1, N, C] of `latents` [1, N, C] at noise level `sigma`, and how it came about."""
        kind = self._kinds[step]
        if kind is StepKind.SKIPPED:
            return self._forecast.at(sigma), kind
        if kind is StepKind.CACHED:
            if self._kept is None:
                raise RuntimeError(f"step {step} is to look at keys that no step has kept; the plan is wrong.")
            velocity = self._forward.cached(step, latents, self._kept)
        else:
            self._kept = None  # before the new ones: they are as large as a fifth of the weights
            velocity, self._kept = self._forward.full(step, latents, keep=self._is_kept_for_later(step))
        if self._extra_steps and self._forecast.is_ready:
            self._watch(step, sigma, velocity)
        self._forecast.learn(sigma, velocity)
        return velocity, kind

    def _is_kept_for_later(self, step: int) -> bool:
        """Whether a step before the next full one looks at what this one could keep."""
        later = self._kinds[step + 1 :]
        until = later.index(StepKind.FULL) if StepKind.FULL in later else len(later)
        may_look = {StepKind.CACHED, StepKind.SKIPPED} if self._extra_steps else {StepKind.CACHED}
        return self._plan.reuses_reference and not may_look.isdisjoint(later[:until])

    def _watch(self, step: int, sigma: float, velocity: Tensor) -> None:
        """Have the next step run after all where the forecast of this one was off. It waits for the device."""
        guard = self._plan.guard
        if guard is None or self._kinds[step + 1 : step + 2] != [StepKind.SKIPPED]:
            return
        error = torch.linalg.vector_norm(velocity - self._forecast.at(sigma))
        if error > guard.residual * torch.linalg.vector_norm(velocity):
            self._kinds[step + 1] = StepKind.CACHED if self._plan.reuses_reference else StepKind.FULL
            self._extra_steps -= 1
