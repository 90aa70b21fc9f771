"""A plan carried out over a forward pass that notes what it is asked."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models.acceleration.cost import at_most
from kontextd_models.acceleration.planning import Plan, plan
from kontextd_models.acceleration.preset import Guard, Preset, StepKind
from kontextd_models.acceleration.steps import Steps
from kontextd_models.transformer.forward import Kept
from torch import Tensor

LATENTS = torch.zeros(1, 2, 1)


class Noting:
    """Velocity `velocities[step]` everywhere. `asked` holds F, K for a full pass that keeps, and c<step kept of>."""

    keeps = True

    def __init__(self, velocities: list[float]) -> None:
        self.velocities = velocities
        self.asked: list[str] = []
        self._kept_of: dict[int, int] = {}

    def full(self, step: int, latents: Tensor, *, keep: bool = False) -> tuple[Tensor, Kept | None]:
        self.asked.append("K" if keep else "F")
        kept = Kept(()) if keep else None
        if kept is not None:
            self._held, self._kept_of[id(kept)] = kept, step
        return torch.full_like(latents, self.velocities[step]), kept

    def cached(self, step: int, latents: Tensor, kept: Kept) -> Tensor:
        self.asked.append(f"c{self._kept_of[id(kept)]}")
        return torch.full_like(latents, self.velocities[step])


def carried_out(preset: Preset, velocities: list[float]) -> tuple[list[str], list[float], str]:
    """What was asked for, the velocities, and the kinds, at evenly falling noise levels."""
    count, forward = len(velocities), Noting(velocities)
    steps = Steps(forward, plan(preset, count))
    results = [steps.velocity(step, 1 - step / count, LATENTS) for step in range(count)]
    return forward.asked, [float(velocity.mean()) for velocity, _ in results], "".join(kind for _, kind in results)


def test_full_passes_keep_only_where_somebody_will_look() -> None:
    asked, _, kinds = carried_out(Preset(masks={8: "FFcc.FFc"}), [1.0] * 8)
    assert asked == ["F", "K", "c1", "c1", "F", "K", "c6"]
    assert kinds == "FFcc.FFc"


def test_a_plan_that_looks_at_keys_nobody_kept_fails_and_does_not_run_in_full() -> None:
    wrong = Plan((StepKind.CACHED,), 1, None)
    with pytest.raises(RuntimeError, match="step 0 is to look at keys"):
        Steps(Noting([1.0]), wrong).velocity(0, 1.0, LATENTS)


def test_an_exact_plan_keeps_nothing() -> None:
    assert carried_out(Preset(), [1.0] * 4)[0] == ["F"] * 4


def test_skipped_steps_go_on_along_the_line() -> None:
    _, velocities, _ = carried_out(Preset(masks={6: "FF...F"}), [1.0, 2.0, 0.0, 0.0, 0.0, 9.0])
    torch.testing.assert_close(velocities, [1.0, 2.0, 3.0, 4.0, 5.0, 9.0])


def test_skipped_steps_repeat_the_last_velocity_where_the_order_is_0() -> None:
    preset = Preset(masks={5: "FF..F"}, forecast_order=0)
    assert carried_out(preset, [1.0, 2.0, 0.0, 0.0, 9.0])[1] == [1.0, 2.0, 2.0, 2.0, 9.0]


def test_a_guard_runs_the_next_step_where_a_forecast_was_off() -> None:
    straight = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    bent = [1.0, 2.0, 3.0, 4.0, 50.0, 6.0, 7.0, 8.0]
    preset = Preset(masks={8: "FF..F..F"}, guard=Guard(residual=0.2, extra_steps=1))
    assert carried_out(preset, straight)[2] == "FF..F..F"
    assert carried_out(preset, bent)[2] == "FF..FF.F"


def test_a_guard_spends_no_more_than_its_extra_steps() -> None:
    wild = [1.0, -30.0, 50.0, -70.0, 20.0, -90.0, 10.0, -20.0, 5.0, -6.0]
    mask = "FF.F.F.F.F"
    for extra_steps in (1, 2, 3):
        preset = Preset(masks={10: mask}, guard=Guard(residual=0.01, extra_steps=extra_steps))
        kinds = carried_out(preset, wild)[2]
        assert kinds.count("F") == mask.count("F") + extra_steps


MASKS = st.from_regex(r"\AF[F.c]{0,13}[Fc]\Z")
EXTRA_STEPS, ORDERS = st.integers(1, 9), st.integers(0, 1)


def guarded(mask: str, order: int, extra_steps: int, residual: float = 1e-6) -> Preset:
    return Preset(masks={len(mask): mask}, forecast_order=order, guard=Guard(residual, extra_steps))


def wild(count: int, seed: int = 0) -> list[float]:
    """No three on a line, and no two alike."""
    draw = random.Random(seed)
    return [draw.uniform(1, 9) for _ in range(count)]


@given(MASKS, ORDERS, EXTRA_STEPS)
def test_a_guard_that_always_acts_runs_the_most_steps_that_its_plan_tells(
    mask: str, order: int, extra_steps: int
) -> None:
    preset = guarded(mask, order, extra_steps)
    told, kinds = plan(preset, len(mask)), carried_out(preset, wild(len(mask)))[2]
    assert kinds == "".join(at_most(told))
    assert mask.count(".") - kinds.count(".") == told.extra_steps_at_most


@given(MASKS, ORDERS, EXTRA_STEPS, st.floats(0.05, 2), st.integers(0, 99))
def test_a_guard_that_acts_now_and_then_runs_no_step_that_its_plan_does_not_name(
    mask: str, order: int, extra_steps: int, residual: float, seed: int
) -> None:
    preset = guarded(mask, order, extra_steps, residual)
    told, kinds = plan(preset, len(mask)), carried_out(preset, wild(len(mask), seed))[2]
    ran_too = {step for step in range(len(mask)) if kinds[step] != mask[step]}
    assert ran_too <= set(told.may_run_too)
    assert len(ran_too) <= told.extra_steps_at_most


@given(MASKS, ORDERS, EXTRA_STEPS)
def test_every_step_that_a_plan_names_does_run_where_velocities_leave_their_line_just_before(
    mask: str, order: int, extra_steps: int
) -> None:
    preset = guarded(mask, order, extra_steps, residual=0.01)
    for step in plan(preset, len(mask)).may_run_too:
        bend = len(mask[:step].rstrip("."))  # the gap's first step: the one before it is the first off the line
        velocities = [0.5] * (bend - 1) + wild(len(mask) - bend + 1)
        assert carried_out(preset, velocities)[2][step] != "."


def test_where_the_reference_is_kept_a_guard_runs_steps_with_it() -> None:
    bent = [1.0, 2.0, 3.0, 4.0, 50.0, 6.0, 7.0, 8.0]
    preset = Preset(masks={8: "FF..F..c"}, guard=Guard(residual=0.2, extra_steps=1))
    asked, _, kinds = carried_out(preset, bent)
    assert kinds == "FF..Fc.c"
    assert asked == ["F", "K", "K", "c4", "c4"]
    assert StepKind.CACHED in kinds
