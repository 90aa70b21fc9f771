"""From a preset to the steps of a request: a pure function. Knows no torch and no model."""

from __future__ import annotations

from dataclasses import dataclass

from kontextd_models.acceleration.preset import Guard, Preset, StepKind


@dataclass(frozen=True)
class Plan:
    """The kind of each step, and how those that do not run are made up for."""

    kinds: tuple[StepKind, ...]
    forecast_order: int
    guard: Guard | None

    @property
    def reuses_reference(self) -> bool:
        return StepKind.CACHED in self.kinds

    @property
    def may_run_too(self) -> tuple[int, ...]:
        """The steps, counted from 0, that the guard may have run: the first of each gap, one leading to the next.

        It holds the last step before the gap against its forecast, which takes `forecast_order` + 1 steps that ran
        before that one. Extra steps are such steps too, but come after as many anyway.
        """
        named: list[int] = []
        ran = since_run = 0
        for step, kind in enumerate(self.kinds):
            skipped = kind is StepKind.SKIPPED
            ran, since_run = (ran, since_run + 1) if skipped else (ran + 1, 0)
            if self.guard and ran >= self.forecast_order + 2 and 1 <= since_run <= self.guard.extra_steps:
                named.append(step)
        return tuple(named)

    @property
    def extra_steps_at_most(self) -> int:
        """How many the guard has run where it always acts: the first so many of `may_run_too`."""
        return min(self.guard.extra_steps, len(self.may_run_too)) if self.guard else 0


def plan(preset: Preset, steps: int, *, keeps_reference: bool = True) -> Plan:
    """The plan of `steps` steps. Without `keeps_reference` the steps that would keep it run in full instead."""
    mask = preset.masks.get(steps)
    kinds = tuple(map(StepKind, mask)) if mask is not None else _spread(preset, steps)
    if not keeps_reference:
        kinds = tuple(StepKind.FULL if kind is StepKind.CACHED else kind for kind in kinds)
    return Plan(kinds, preset.forecast_order, preset.guard)


def _spread(preset: Preset, steps: int) -> tuple[StepKind, ...]:
    """Prefix, then evenly to the last step. The prefix and the last step count most (cache-dit's step masks)."""
    prefix = min(preset.prefix, steps)
    computed = max(int(preset.computed * steps + 0.5), min(prefix + 1, steps))
    kinds = [StepKind.FULL] * prefix + [StepKind.SKIPPED] * (steps - prefix)
    late = _evenly(computed - prefix, prefix, steps)
    for step in late:
        kinds[step] = StepKind.CACHED if preset.reuse_reference else StepKind.FULL
    refreshes = min(preset.refreshes, len(late)) if preset.reuse_reference else 0
    for turn in range(1, refreshes + 1):
        kinds[late[turn * len(late) // (refreshes + 1)]] = StepKind.FULL
    return tuple(kinds)


def _evenly(count: int, first: int, end: int) -> list[int]:
    """`count` of the steps `first` to `end` (not included), evenly, the last one among them."""
    return [first + -(-(turn * (end - first)) // count) - 1 for turn in range(1, count + 1)]
