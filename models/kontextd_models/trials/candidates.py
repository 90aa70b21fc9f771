"""The rows that a calibration tries, from published evidence, in a fixed order. Knows rows; knows no engine.

How many steps run: 18, 15, 11 and 8 of 28 are cache-dit's step masks slow, medium, fast and ultra (its SCM), 13 is what
Replicate's `go_fast` computes. A prefix of full steps counts most, four to eight of them by those masks; three is there
for the shortest. RegionE keeps the reference's keys and values for about ten steps: none, one or two refreshes. A
forecast beats reuse above 3× (TaylorSeer): orders 1 and 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kontextd_models.acceleration.planning import plan
from kontextd_models.acceleration.preset import SHORTCUTS, Preset, StepKind
from kontextd_models.records import Acceleration

_SHARES = (15, 11, 18, 8, 13)  # of 28 steps; the middle of the range first
_OF = 28
_PREFIXES = (4, 3, 6)
_ORDERS = (1, 0)
_REFRESHES = (None, 1, 0, 2)  # None: the reference is not kept
_EXACT = "every step, every token"


@dataclass(frozen=True)
class Candidate:
    """A row under a name; `mask` holds the kinds of its steps, such as FFFFc.c."""

    name: str
    row: Preset
    mask: str

    @property
    def is_exact(self) -> bool:
        return set(self.mask) == {StepKind.FULL}

    @property
    def computed_share(self) -> float:
        """Of the steps: those that run at all."""
        return 1 - self.mask.count(StepKind.SKIPPED) / len(self.mask)


def candidates(steps: int, present: Mapping[Acceleration, Preset]) -> list[Candidate]:
    """The rows in force, then those of the evidence, the most promising first; of two that do the same one."""
    found: dict[tuple[str, int, tuple[float, int] | None], Candidate] = {}
    for row in (*_in_force(present), *_published()):
        planned = plan(row, steps)
        mask = "".join(planned.kinds)
        order = row.forecast_order if StepKind.SKIPPED in mask else 1
        guard = (row.guard.residual, planned.extra_steps_at_most) if row.guard and planned.may_run_too else None
        candidate = Candidate(name_of(row, steps), row, mask)
        if not candidate.is_exact:
            found.setdefault((mask, order, guard), candidate)
    return list(found.values())


def exact(steps: int) -> Candidate:
    """Every step and token, the modulation in the loop: what stays where nothing meets a gate."""
    return Candidate(_EXACT, Preset(summary=_EXACT), StepKind.FULL * steps)


def name_of(row: Preset, steps: int) -> str:
    """What it does, in a few words, such as "15 of 30 steps, 4 first, reference kept, 1 refresh"."""
    did = _Doing.of(row, steps)
    parts = [f"{did.runs} of {steps} steps", f"{did.first} first"]
    if did.keeps_reference:
        parts += ["reference kept", {0: "no refresh", 1: "1 refresh"}.get(did.refreshes, f"{did.refreshes} refreshes")]
    if did.runs < steps and row.forecast_order == 0:
        parts.append("last velocity")
    if row.guard is not None and did.extra_steps:
        parts.append(f"guard up to {did.extra_steps} at {row.guard.residual:g}")
    return ", ".join(parts)


def summary_of(row: Preset, steps: int) -> str:
    """The same as a sentence, for a row that has no `summary` of its own. Of a guard it says nothing."""
    did = _Doing.of(row, steps)
    if did.first == steps:
        return _EXACT
    how = "all in full"
    if did.keeps_reference:
        refreshes = {0: "", 1: ", one refresh"}.get(did.refreshes, f", {did.refreshes} refreshes")
        how = f"{did.first} in full{refreshes}, the others with the reference kept"
    rest = "the rest is forecast" if row.forecast_order else "the rest takes the last velocity"
    return f"{did.runs} of {steps} steps: {how}" + (f"; {rest}" if did.runs < steps else "")


@dataclass(frozen=True)
class _Doing:
    """What the steps of a plan amount to."""

    runs: int
    first: int  # in full at the beginning
    refreshes: int
    keeps_reference: bool
    extra_steps: int  # that a guard adds at most

    @classmethod
    def of(cls, row: Preset, steps: int) -> _Doing:
        planned = plan(row, steps)
        mask = "".join(planned.kinds)
        first, keeps = len(mask) - len(mask.lstrip(StepKind.FULL)), StepKind.CACHED in mask
        refreshes = mask[mask.index(StepKind.CACHED) :].count(StepKind.FULL) if keeps else 0
        return cls(steps - mask.count(StepKind.SKIPPED), first, refreshes, keeps, planned.extra_steps_at_most)


def _in_force(present: Mapping[Acceleration, Preset]) -> Iterator[Preset]:
    """With both shortcuts: they change no more than roundings, and without them a row would hide its published twin."""
    for name, row in present.items():
        if name is not Acceleration.NONE:
            yield replace(row, modulation_ahead=SHORTCUTS.modulation_ahead, trim_last_block=SHORTCUTS.trim_last_block)


def _published() -> Iterator[Preset]:
    """First one trait at a time away from the plain row, over all shares; then the rest of the grid."""
    plain = (_PREFIXES[0], _ORDERS[0])
    for prefix, order in (plain, *((p, o) for o in _ORDERS for p in _PREFIXES if (p, o) != plain)):
        for refreshes in _REFRESHES:
            for share in _SHARES:
                row = replace(SHORTCUTS, computed=round(share / _OF, 4), prefix=prefix, forecast_order=order)
                yield row if refreshes is None else replace(row, reuse_reference=True, refreshes=refreshes)
