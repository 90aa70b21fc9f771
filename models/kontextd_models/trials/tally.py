"""What rounds of a comparison come to: medians of seconds, means of likeness. Knows figures; holds no pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kontextd_models.records import Acceleration, PresetUse
from kontextd_models.trials.benching import Likeness, Round
from kontextd_models.trials.cases import LoraSet, Size

ENOUGH_DB = 60.0  # no eye tells more apart, and a few equal pictures (infinite) would lift any mean over any gate


@dataclass(frozen=True)
class Speed:
    """Of one preset at one size with one set of LoRAs: medians over its edits, and ratios of these to `none`'s."""

    loras: str
    size: Size
    preset: Acceleration
    edits: int
    use: PresetUse
    seconds: Mapping[str, float]  # by stage, and "total"
    slowest_denoise_s: float
    denoise_speedup: float
    total_speedup: float


@dataclass(frozen=True)
class Fidelity:
    """Of one preset with one set of LoRAs, over every photo, prompt and size."""

    loras: str
    preset: Acceleration
    pictures: int
    mean_psnr: float
    worst_psnr: float
    mean_ssim: float
    worst_ssim: float


@dataclass(frozen=True)
class Compared:
    """One picture of one preset."""

    photo: str
    prompt: str
    loras: str
    size: Size
    preset: Acceleration
    likeness: Likeness
    is_flagged: bool


class Tally:
    """Takes rounds in, one after the other."""

    def __init__(self) -> None:
        self._timings: dict[tuple[LoraSet, Size, Acceleration], list[Mapping[str, float]]] = {}
        self._uses: dict[tuple[LoraSet, Size, Acceleration], PresetUse] = {}
        self._likenesses: dict[tuple[LoraSet, Acceleration], list[Likeness]] = {}
        self.compared: list[Compared] = []

    def add(self, made: Round) -> None:
        case = made.case
        for name, run in made.runs.items():
            key = (case.loras, case.size, name)
            self._timings.setdefault(key, []).append(run.timings)
            self._uses[key] = PresetUse(name, run.use.full, run.use.cached, run.use.skipped)
        for name, likeness in made.likeness.items():
            self._likenesses.setdefault((case.loras, name), []).append(likeness)
            flagged = made.runs[name].is_flagged
            self.compared.append(Compared(case.photo, case.prompt, case.loras.name, case.size, name, likeness, flagged))

    def speeds(self) -> list[Speed]:
        medians = {key: _medians(timings) for key, timings in self._timings.items()}
        return [
            Speed(
                loras=loras.name,
                size=size,
                preset=preset,
                edits=len(self._timings[loras, size, preset]),
                use=self._uses[loras, size, preset],
                seconds=seconds,
                slowest_denoise_s=max(timings["denoise"] for timings in self._timings[loras, size, preset]),
                denoise_speedup=medians[loras, size, Acceleration.NONE]["denoise"] / seconds["denoise"],
                total_speedup=medians[loras, size, Acceleration.NONE]["total"] / seconds["total"],
            )
            for (loras, size, preset), seconds in medians.items()
        ]

    def fidelities(self) -> list[Fidelity]:
        return [
            Fidelity(
                loras=loras.name,
                preset=preset,
                pictures=len(found),
                mean_psnr=mean_db(one.psnr for one in found),
                worst_psnr=min(one.psnr for one in found),
                mean_ssim=fmean(one.ssim for one in found),
                worst_ssim=min(one.ssim for one in found),
            )
            for (loras, preset), found in self._likenesses.items()
        ]


def mean_db(values: Iterable[float]) -> float:
    """The mean of PSNRs, each taken for 60 dB at most."""
    return fmean(min(value, ENOUGH_DB) for value in values)


def _medians(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {stage: median(one[stage] for one in timings) for stage in timings[0]}
