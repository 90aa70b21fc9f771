"""The page of `kontextd bench`: speed, fidelity, a plot of both, and pictures side by side. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kontextd_models import Acceleration

from kontextd_server.report.figures import db_text, size_text
from kontextd_server.report.html import Column, facts, heading, page, paragraph, section, table
from kontextd_server.report.pictures import AMPLIFIED, difference, figure, inlined
from kontextd_server.report.plot import Mark, plot

if TYPE_CHECKING:
    from kontextd_models.trials.benching import Likeness, Round
    from kontextd_models.trials.tally import Compared, Fidelity, Speed

SHOWN = 24  # cases with pictures
LPIPS = "LPIPS is left out: it needs a network's weights, and none ship with kontextd."
_STAGES = {  # of `Done.timings`, and what a column is called
    "encode_prompt": "prompt",
    "encode_image": "photo",
    "merge": "merge",
    "denoise": "denoise",
    "decode": "decode",
    "safety": "safety",
}


@dataclass(frozen=True)
class Strip:
    """The pictures of one case as `data:` URIs, by name: photo, and each preset; and the maps of differences."""

    photo: str
    prompt: str
    where: str
    pictures: Mapping[str, str]
    differences: Mapping[str, str]
    likeness: Mapping[Acceleration, Likeness]

    @property
    def worst_psnr(self) -> float:
        return min(likeness.psnr for likeness in self.likeness.values())


def strip_of(made: Round) -> Strip:
    """Of a round whose pictures were compared."""
    case, exact = made.case, made.runs[Acceleration.NONE].image
    return Strip(
        photo=case.photo,
        prompt=case.prompt,
        where=f"{size_text(case.size)}, {case.loras.name}",
        pictures={"photo": inlined(case.image), **{name.value: inlined(run.image) for name, run in made.runs.items()}},
        differences={name.value: inlined(difference(made.runs[name].image, exact)) for name in made.likeness},
        likeness=made.likeness,
    )


def bench_page(
    subject: Mapping[str, str],
    speeds: Sequence[Speed],
    fidelities: Sequence[Fidelity],
    compared: Sequence[Compared],
    strips: Sequence[Strip],
    warnings: Sequence[str],
) -> str:
    """The whole document. `subject` says what was measured, on what, and how."""
    worst = sorted(strips, key=lambda strip: strip.worst_psnr)[:SHOWN]
    few = "" if len(worst) == len(strips) else f" Of {len(strips)} edits the {len(worst)} least alike are shown."
    return page(
        "The presets, side by side",
        f"{subject['model']}: regular and high against none, measured with kontextd bench.",
        [
            section("Time and fidelity", plot(_marks(speeds, fidelities, compared)), paragraph(_LEGEND, "note")),
            section("Speed", _speed_table(speeds), paragraph(_SPEED_NOTE, "note")),
            section("Fidelity to none", fidelity_table(fidelities), paragraph(f"{_FIDELITY_NOTE} {LPIPS}", "note")),
            section(
                "Pictures", paragraph(f"The least alike come first. {_PICTURES_NOTE}{few}", "note"), *map(_case, worst)
            ),
            section("What was measured", facts(subject), *(paragraph(text, "warning") for text in warnings)),
        ],
    )


_LEGEND = (
    "Large: mean over all edits. Small: single pictures. The presets are run in turns, one right after the other, so "
    "that a busy machine slows all of them alike."
)
_SPEED_NOTE = (
    "Seconds by stage are medians over warm edits. Prompt and photo are encoded anew each time, as for a request that "
    "brings new ones; LoRAs are merged already. The factors hold in the same run: × none is how many times as fast."
)
_FIDELITY_NOTE = (
    "PSNR and SSIM are to the picture that none makes of the same seed. In means, PSNR counts as 60 dB at most: an "
    "equal picture would else lift any mean."
)
_PICTURES_NOTE = f"Differences to none are amplified {AMPLIFIED} times: black is equal."


def fidelity_table(rows: Sequence[Fidelity]) -> str:
    columns = [
        Column("LoRAs"),
        Column("preset"),
        *(Column(name, "number") for name in ("pictures", "PSNR, dB", "worst", "SSIM", "worst")),
    ]
    cells = [
        [
            row.loras,
            row.preset.value,
            str(row.pictures),
            db_text(row.mean_psnr),
            db_text(row.worst_psnr),
            f"{row.mean_ssim:.4f}",
            f"{row.worst_ssim:.4f}",
        ]
        for row in rows
    ]
    return table(columns, cells)


def _speed_table(rows: Sequence[Speed]) -> str:
    stages = {stage: short for stage, short in _STAGES.items() if any(row.seconds[stage] >= 0.0005 for row in rows)}
    numbers = ("edits", "full", "cached", "skipped", *stages.values(), "total", "denoise × none", "total × none")
    columns = [*map(Column, ("size", "LoRAs", "preset")), *(Column(name, "number") for name in numbers)]
    cells = [
        [
            size_text(row.size),
            row.loras,
            row.preset.value,
            *map(str, (row.edits, row.use.full, row.use.cached, row.use.skipped)),
            *(f"{row.seconds[stage]:.3f}" for stage in (*stages, "total")),
            f"{row.denoise_speedup:.2f}",
            f"{row.total_speedup:.2f}",
        ]
        for row in rows
    ]
    return table(columns, cells)


def _marks(speeds: Sequence[Speed], fidelities: Sequence[Fidelity], compared: Sequence[Compared]) -> list[Mark]:
    percent = {(row.loras, row.size, row.preset): 100 / row.denoise_speedup for row in speeds}
    small = [
        Mark(
            percent[row.loras, row.size, row.preset],
            row.likeness.psnr,
            row.preset.value,
            f"{row.preset.value}: {row.photo}, {row.prompt}, {size_text(row.size)}, {row.loras}: "
            f"{db_text(row.likeness.psnr)} dB",
            is_faint=True,
        )
        for row in compared
    ]
    several = len({row.loras for row in fidelities}) > 1
    large = [_mean_mark(row, percent, several) for row in fidelities]
    return [*small, *large, Mark(100, math.inf, "none", "none: every step, every token", "none")]


def _mean_mark(
    row: Fidelity, percent: Mapping[tuple[str, tuple[int, int], Acceleration], float], several: bool
) -> Mark:
    """At the mean of its times over all sizes."""
    times = [value for (loras, _, preset), value in percent.items() if (loras, preset) == (row.loras, row.preset)]
    where, label = sum(times) / len(times), f"{row.preset.value}, {row.loras}" if several else row.preset.value
    note = f"{label}: {where:.0f} % of the time of none, {db_text(row.mean_psnr)} dB"
    return Mark(where, row.mean_psnr, row.preset.value, note, label)


def _case(strip: Strip) -> str:
    title = heading(strip.prompt, f"{strip.photo}, {strip.where}")
    notes = {
        name.value: f"{db_text(likeness.psnr)} dB, SSIM {likeness.ssim:.3f}"
        for name, likeness in strip.likeness.items()
    }
    figures = [figure(uri, name, notes.get(name, ""), name) for name, uri in strip.pictures.items()]
    maps = [
        f'<div class="{"below" if index == 0 else ""}">'
        + figure(uri, f"{name} − none", f"× {AMPLIFIED}", name)
        + "</div>\n"
        for index, (name, uri) in enumerate(strip.differences.items())
    ]
    return f'<div class="case">\n{title}<div class="strip">\n{"".join(figures)}{"".join(maps)}</div>\n</div>\n'
