"""Rows tried one after the other until the time is up. Knows engines and clocks; knows no gates and no files.

The first engine makes the pictures that everything is held against, by its `none`. Its seconds say how many cases and
rows the budget has room for. The seconds of a row stand beside those of a `none` that ran long before, so whatever has
slowed the machine down or up since is in their ratio: rows that may win are timed again in turns with `none`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from PIL import Image

from kontextd_models.errors import InvalidValue, OutOfMemory
from kontextd_models.fidelity import psnr
from kontextd_models.trials.candidates import Candidate
from kontextd_models.trials.cases import Case, LoraSet, thinned
from kontextd_models.trials.running import Runner
from kontextd_models.trials.tally import mean_db

log = logging.getLogger(__name__)

TURNS = 5
_FOR_REFERENCES = 1 / 7  # of the budget at most: the rest has room for a dozen rows at half the time of `none`


@dataclass(frozen=True)
class Point:
    """What a row came to over all cases; `ratio` is the median of its seconds of denoising to those of `none`."""

    precision: str
    candidate: Candidate
    ratio: float
    denoise_s: float  # median
    mean_psnr: Mapping[str, float]  # to `none`, in dB, by set of LoRAs
    worst_picture_psnr: float
    worst_picture: str
    turns: int = 0  # edits that `ratio` comes from, each beside one of `none`; 0: all against those of the start

    @property
    def psnr(self) -> float:
        """What a gate is held to: the lowest of the means."""
        return min(self.mean_psnr.values())


@dataclass(frozen=True)
class _Reference:
    image: Image.Image
    denoise_s: float
    total_s: float


class Budget:
    """Seconds from now on, less those that are spent already. `clock` tells seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, *, spent: float = 0.0) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + seconds - spent

    def left(self) -> float:
        return self._end - self._clock()


class Sweep:
    """All that is known so far stands in it, so that one that is broken off can be reported too."""

    def __init__(self, cases: Sequence[Case], budget: Budget) -> None:
        self.cases, self.budget = list(cases), budget
        self.left_out = 0  # cases for which the budget has no room
        self.points: list[Point] = []
        self.not_reached: list[tuple[str, Candidate]] = []
        self.too_large: list[tuple[str, Candidate]] = []  # for the device's memory
        self._references: dict[Case, _Reference] = {}

    @property
    def reference_denoise_s(self) -> float:
        """Median over the cases."""
        return median(one.denoise_s for one in self._references.values())

    def make_references(self, runner: Runner) -> Iterator[Case]:
        """Fit the cases to the budget and make the pictures of `none`; yields each case once it has its own.

        Raises `InvalidValue` where not even a case of each set of LoRAs fits.
        """
        first = self.cases[0]
        runner.warm_up([first])
        self._references[first] = self._reference(runner, first)
        one_s = self._references[first].total_s
        sets, room = len({case.loras for case in self.cases}), self.budget.left() * _FOR_REFERENCES
        if room < sets * one_s:
            raise InvalidValue(
                f"budget is {self.budget.seconds:g} s; an edit takes {one_s:.1f} s here, and {sets} of them are the "
                f"least to hold rows against. Give at least {sets * one_s / _FOR_REFERENCES * 1.5:.0f} s, or fewer "
                "steps.",
                field="budget",
            )
        kept = thinned(self.cases, int(room / one_s))
        self.left_out, self.cases = len(self.cases) - len(kept), kept
        runner.warm_up(kept)
        for case in kept:
            if case not in self._references:
                self._references[case] = self._reference(runner, case)
            yield case

    def run(self, runner: Runner, precision: str, candidates: Sequence[Candidate], seconds: float) -> Iterator[Point]:
        """Try rows for so many seconds at most. A row whose edits would take longer than is left is passed over."""
        until = self.budget.left() - seconds
        for index, candidate in enumerate(candidates):
            self.not_reached.append((precision, candidate))
            try:
                point = self._tried(runner, precision, candidate, until)
            except OutOfMemory as error:
                log.warning("%s: %s", candidate.name, error)
                self.too_large.append(self.not_reached.pop())
                point = None
            if point is not None:
                self.not_reached.pop()
                self.points.append(point)
                yield point
            if self.budget.left() <= until:
                self.not_reached += [(precision, other) for other in candidates[index + 1 :]]
                return

    def run_off(self, runner: Runner, finalists: Sequence[Point], seconds: float) -> Iterator[int]:
        """Time rows of one precision again, in turns with its `none`; yields the number of each round that is over.

        Each round takes another case, and the order moves on by one. It ends after `TURNS` rounds, or before one that
        would take longer than is left of so many seconds. The points get their new ratios after each round.
        """
        places = [self.points.index(point) for point in finalists]
        none_ratio = self._none_ratio(finalists[0].precision) if finalists else None
        if none_ratio is None:
            return
        until = self.budget.left() - seconds
        found: list[list[float]] = [[] for _ in finalists]
        for turn in range(TURNS):
            case = self.cases[turn % len(self.cases)]
            none_s = self._expected_s(case, none_ratio)
            expected_s = sum(self._expected_s(case, none_ratio * point.candidate.computed_share) for point in finalists)
            if self.budget.left() - expected_s - none_s < until:
                return
            try:
                of_turn = self._ratios(runner, case, finalists, turn)
            except OutOfMemory as error:  # they have run before: somebody else has taken memory since
                log.warning("timing in turns ends: %s", error)
                return
            for ratios, ratio in zip(found, of_turn, strict=True):
                ratios.append(none_ratio * ratio)
            for place, ratios in zip(places, found, strict=True):
                self.points[place] = replace(self.points[place], ratio=median(ratios), turns=len(ratios))
            yield turn + 1

    def _none_ratio(self, precision: str) -> float | None:
        """The seconds of a precision's `none` to those of the first one's; None where that was not tried."""
        exact = (point for point in self.points if point.precision == precision and point.candidate.is_exact)
        is_first = bool(self.points) and precision == self.points[0].precision
        return next((point.ratio for point in exact), 1.0 if is_first else None)

    def _ratios(self, runner: Runner, case: Case, finalists: Sequence[Point], turn: int) -> list[float]:
        """Of one round: the seconds of denoising of each to those of `none`."""
        start = turn % (len(finalists) + 1)
        seconds: dict[int, float] = {}
        for number in (*range(start, len(finalists) + 1), *range(start)):
            made = runner.run(case, finalists[number - 1].candidate.row) if number else runner.none(case)
            seconds[number] = made.timings["denoise"]
        return [seconds[number] / seconds[0] for number in range(1, len(finalists) + 1)]

    def _reference(self, runner: Runner, case: Case) -> _Reference:
        made = runner.exact(case)
        return _Reference(made.image, made.timings["denoise"], made.timings["total"])

    def _tried(self, runner: Runner, precision: str, candidate: Candidate, until: float) -> Point | None:
        """None where the time does not suffice. Raises `OutOfMemory`."""
        ratio = (self._none_ratio(precision) or 1.0) * candidate.computed_share
        expected_s = {case: self._expected_s(case, ratio) for case in self.cases}
        left_s = sum(expected_s.values())
        found: dict[Case, tuple[float, float]] = {}  # dB and seconds, by case
        for case in self.cases:
            if self.budget.left() - left_s < until:
                return None
            exact = self._references[case]
            made = runner.run(case, candidate.row)
            found[case] = (psnr(made.image, exact.image), made.timings["denoise"])
            left_s -= expected_s[case]
        return self._point(precision, candidate, found)

    def _expected_s(self, case: Case, ratio: float) -> float:
        """Where denoising takes so many times that of `none` of the first precision, and the rest as long as there.

        A row's ratio is taken as if every step that runs ran in full: rather too long than too short.
        """
        exact = self._references[case]
        return exact.total_s - exact.denoise_s * (1 - ratio)

    def _point(self, precision: str, candidate: Candidate, found: Mapping[Case, tuple[float, float]]) -> Point:
        by_set: dict[LoraSet, list[float]] = {}
        for case, (db, _) in found.items():
            by_set.setdefault(case.loras, []).append(db)
        worst = min(found, key=lambda case: found[case][0])
        return Point(
            precision=precision,
            candidate=candidate,
            ratio=median(seconds / self._references[case].denoise_s for case, (_, seconds) in found.items()),
            denoise_s=median(seconds for _, seconds in found.values()),
            mean_psnr={loras.name: mean_db(values) for loras, values in by_set.items()},
            worst_picture_psnr=found[worst][0],
            worst_picture=worst.name,
        )
