"""`kontextd bench`: speed and fidelity of the presets on one's own weights, photos and card. Knows no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_models import Acceleration, load_engine

from kontextd_server.cli_edit import check_can_be_folder
from kontextd_server.cli_trials import (
    Subject,
    add_trial_options,
    encoding_anew,
    facts_of,
    header,
    kept_whatever_fails,
    quiet_engine,
    subject_of,
    told,
)
from kontextd_server.files.atomic import make_folder, replace_whole
from kontextd_server.picture_files import UsageError
from kontextd_server.report.figures import aligned, counted, db_json, db_text, size_text
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.trials.benching import Round
    from kontextd_models.trials.running import Runner
    from kontextd_models.trials.tally import Compared, Fidelity, Speed, Tally

    from kontextd_server.report.bench import Strip

_REPEATS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    add_trial_options(parser)
    parser.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        default=[],
        metavar="WxH",
        help="sizes to edit each photo at, its middle cut to their aspect. Default: the model's preferred size",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=_REPEATS,
        metavar="N",
        help="edits of each preset that are timed at each size, at the least; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, default=Path("kontextd-bench"), metavar="DIR", help="default: %(default)s")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.repeats < 1:
        raise UsageError(f"--repeats is {arguments.repeats}; it must be at least 1.")
    check_can_be_folder(arguments.out, "--out")
    subject = subject_of(arguments, settings, arguments.sizes)
    told(f"loading {subject.folder.card.name}", quiet=arguments.json)
    found = _Found(_runner(settings, subject), subject, arguments.repeats)
    with kept_whatever_fails(lambda: _report_broken_off(arguments.out, found, quiet=arguments.json)), quiet_engine():
        found.measure(quiet=arguments.json)
    results = _report(arguments.out, found)
    report = arguments.out / "report.html"
    print(json.dumps(results, indent=2) if arguments.json else f"{_text(found)}\n\nreport: {report}")
    return 0


def _runner(settings: Settings, subject: Subject) -> Runner:
    from kontextd_models.trials.running import Runner

    return Runner(load_engine(encoding_anew(settings.engine_config())), subject.manner)


class _Found:
    """All figures so far, and the pictures of every case as a page holds them."""

    def __init__(self, runner: Runner, subject: Subject, repeats: int) -> None:
        from kontextd_models.trials.benching import count_rounds
        from kontextd_models.trials.tally import Tally

        self.runner, self.subject, self.repeats = runner, subject, repeats
        self.tally = Tally()
        self.strips: list[Strip] = []
        self.rounds, self.all_rounds = 0, count_rounds(subject.cases, repeats)

    @property
    def warnings(self) -> list[str]:
        ended = f"it was broken off: these are figures of {self.rounds} of {counted(self.all_rounds, 'round')}."
        broken_off = [ended] if self.rounds < self.all_rounds else []
        return [*broken_off, *self.runner.warnings, *_flagged(self.tally.compared)]

    def measure(self, *, quiet: bool) -> None:
        from kontextd_models.trials.benching import bench

        from kontextd_server.report.bench import strip_of

        for made in bench(self.runner, self.subject.cases, self.repeats):
            told(f"{self.rounds + 1}/{self.all_rounds}  {_line(made)}", quiet=quiet)
            if made.likeness:
                self.strips.append(strip_of(made))
            self.tally.add(made)
            self.rounds += 1


def _report_broken_off(out: Path, found: _Found, *, quiet: bool) -> None:
    """Nothing, where no round was finished."""
    if found.rounds:
        _report(out, found)
        told(f"report of what was measured: {out / 'report.html'}", quiet=quiet)


def _report(out: Path, found: _Found) -> dict[str, object]:
    """Write both reports."""
    from kontextd_server.report.bench import bench_page

    results, tally, folder = _results(found), found.tally, make_folder(out)
    replace_whole(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    page = bench_page(
        {**facts_of(results, found.subject.cases), "presets": str(found.runner.engine.presets.file)},
        tally.speeds(),
        tally.fidelities(),
        tally.compared,
        found.strips,
        found.warnings,
    )
    replace_whole(folder / "report.html", page.encode())
    return results


def _line(made: Round) -> str:
    parts = [f"{made.case.name}  "]
    for name, run in made.runs.items():
        likeness = made.likeness.get(name)
        psnr = f" {likeness.psnr:.1f} dB" if likeness else ""
        parts.append(f"{name.value} {run.timings['denoise']:.2f} s{psnr}")
    return "  ".join(parts)


def _text(found: _Found) -> str:
    from kontextd_server.report.bench import LPIPS

    tally = found.tally
    parts = [f"medians of warm edits\n{_speed_table(tally)}", f"fidelity to none\n{_fidelity_table(tally)}\n{LPIPS}"]
    return "\n\n".join([*parts, *(f"warning: {warning}" for warning in found.warnings)])


def _speed_table(tally: Tally) -> str:
    head = ("size", "LoRAs", "preset", "edits", "full", "cached", "skipped", "denoise", "× none", "total", "× none")
    rows = [
        (
            size_text(row.size),
            row.loras,
            row.preset.value,
            *map(str, (row.edits, row.use.full, row.use.cached, row.use.skipped)),
            f"{row.seconds['denoise']:.3f} s",
            f"{row.denoise_speedup:.2f}",
            f"{row.seconds['total']:.3f} s",
            f"{row.total_speedup:.2f}",
        )
        for row in tally.speeds()
    ]
    return aligned(head, rows, texts=3)


def _fidelity_table(tally: Tally) -> str:
    head = ("LoRAs", "preset", "pictures", "PSNR", "worst", "SSIM", "worst")
    rows = [
        (
            row.loras,
            row.preset.value,
            str(row.pictures),
            f"{db_text(row.mean_psnr)} dB",
            db_text(row.worst_psnr),
            f"{row.mean_ssim:.4f}",
            f"{row.worst_ssim:.4f}",
        )
        for row in tally.fidelities()
    ]
    return aligned(head, rows, texts=2)


def _results(found: _Found) -> dict[str, object]:
    from kontextd_models.acceleration.table import row_as_json

    from kontextd_server.report.bench import LPIPS

    table, tally = found.runner.engine.presets, found.tally
    return {
        **header(found.runner),
        "repeats": found.repeats,
        "rounds": found.rounds,
        "rounds_planned": found.all_rounds,
        "presets": {
            "file": str(table.file),
            "about": table.about,
            "precision": table.precision,
            "rows": {name.value: row_as_json(row) for name, row in table.rows.items()},
        },
        "speed": [_speed(row) for row in tally.speeds()],
        "fidelity": [_fidelity(row) for row in tally.fidelities()],
        "pictures": [_compared(row) for row in tally.compared],
        "lpips": LPIPS,
    }


def _speed(row: Speed) -> dict[str, object]:
    return {**asdict(row), "seconds": {stage: round(seconds, 4) for stage, seconds in row.seconds.items()}}


def _fidelity(row: Fidelity) -> dict[str, object]:
    return {**asdict(row), "mean_psnr": db_json(row.mean_psnr), "worst_psnr": db_json(row.worst_psnr)}


def _compared(row: Compared) -> dict[str, object]:
    likeness = {"psnr": db_json(row.likeness.psnr), "ssim": round(row.likeness.ssim, 5)}
    return {key: value for key, value in asdict(row).items() if key != "likeness"} | likeness


def _flagged(compared: Sequence[Compared]) -> list[str]:
    return [
        f"the safety checker flagged {row.preset.value} of {row.photo}, {row.prompt!r}, {row.loras}, and not none: its "
        "picture is black, and its figures say nothing."
        for row in compared
        if row.is_flagged and row.preset is not Acceleration.NONE
    ]


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use WIDTHxHEIGHT, as 1024x1024.")
    if min(int(width), int(height)) < 1 or max(len(width), len(height)) > 5:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a picture: use WIDTHxHEIGHT, as 1024x1024.")
    return int(width), int(height)
