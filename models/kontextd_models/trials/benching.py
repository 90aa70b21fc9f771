"""The three presets side by side. Knows engines and pictures; sums nothing up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from kontextd_models.fidelity import psnr, ssim
from kontextd_models.records import Acceleration
from kontextd_models.trials.cases import Case
from kontextd_models.trials.running import Run, Runner


@dataclass(frozen=True)
class Likeness:
    """Of a picture to that of `none`: PSNR in dB, infinite where they are equal, and SSIM up to 1."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Round:
    """One case by every preset, one right after the other. A case that comes again is not compared again."""

    case: Case
    runs: Mapping[Acceleration, Run]
    likeness: Mapping[Acceleration, Likeness]  # empty where the case comes again


def count_rounds(cases: Sequence[Case], repeats: int) -> int:
    return sum(max(len(group), repeats) for group in _groups(cases))


def bench(runner: Runner, cases: Sequence[Case], repeats: int) -> Iterator[Round]:
    """Every case once, and on until each preset has made `repeats` edits at each size with each set of LoRAs.

    The presets take turns within a round, the order moved on by one each round, so that whatever slows the machine
    down hits them alike.
    """
    for group in _groups(cases):
        runner.warm_up(group)
        for turn in range(max(len(group), repeats)):
            yield _round(runner, group[turn % len(group)], turn, is_new=turn < len(group))


def _round(runner: Runner, case: Case, turn: int, *, is_new: bool) -> Round:
    rows, names = runner.engine.presets.rows, list(Acceleration)
    start = turn % len(names)
    runs: dict[Acceleration, Run] = {}
    for name in (*names[start:], *names[:start]):
        runs[name] = runner.exact(case) if name is Acceleration.NONE else runner.run(case, rows[name])
    exact = runs[Acceleration.NONE].image
    likeness: dict[Acceleration, Likeness] = {
        name: Likeness(psnr(run.image, exact), ssim(run.image, exact))
        for name, run in runs.items()
        if is_new and name is not Acceleration.NONE
    }
    return Round(case, {name: runs[name] for name in names}, likeness)


def _groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Neighbours of one size and one set of LoRAs, as `cases.cases` orders them."""
    return [list(group) for _, group in groupby(cases, key=lambda case: (case.loras, case.size))]
