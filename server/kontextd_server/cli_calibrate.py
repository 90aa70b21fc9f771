"""`kontextd calibrate`: presets for one's own weights, photos and LoRAs, under a gate of fidelity. Knows no torch."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_models import Acceleration, load_engine

from kontextd_server.cli_times import span, span_text
from kontextd_server.cli_trials import (
    Subject,
    add_trial_options,
    facts_of,
    header,
    kept_whatever_fails,
    quiet_engine,
    subject_of,
    told,
)
from kontextd_server.files.atomic import create_whole, replace_whole
from kontextd_server.picture_files import UsageError
from kontextd_server.report.figures import counted
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.acceleration.preset import Preset
    from kontextd_models.trials.candidates import Candidate
    from kontextd_models.trials.choosing import Choice, Gates
    from kontextd_models.trials.running import Runner
    from kontextd_models.trials.sweeping import Sweep

    from kontextd_server.report.outcome import Outcome

_BUDGET_S = 30 * 60.0
_FOR_RUN_OFF = 1 / 6  # of a precision's time: five turns of a few rows, where it tries a dozen on as many edits
_GATES = {Acceleration.REGULAR: 31.0, Acceleration.HIGH: 28.0}
_GATES_OF_DEMONSTRATION = {Acceleration.REGULAR: 35.0, Acceleration.HIGH: 30.0}
_PRECISIONS = ("full", "fp8")
_MOST_DB = 60.0  # what an equal picture counts in a mean: nothing meets a gate above


def add_options(parser: argparse.ArgumentParser) -> None:
    add_trial_options(parser)
    for name, gate in _GATES.items():
        parser.add_argument(
            f"--{name.value}-psnr",
            type=float,
            metavar="DB",
            help=f"the fidelity {name.value} is to have: mean PSNR to none, with the worst set of LoRAs; default: "
            f"{gate:g} ({_GATES_OF_DEMONSTRATION[name]:g} with a demonstration model)",
        )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=_PRECISIONS,
        default=[],
        metavar="NAME",
        help="full, fp8 or both, each on an engine of its own, held against the first; default: the present one",
    )
    parser.add_argument(
        "--budget", type=span, default=_BUDGET_S, metavar="TIME", help="such as 90s, 30min or 2h; default: 30min"
    )
    parser.add_argument("--out", type=Path, default=Path("presets.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace FILE and its reports where they are there")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Ctrl-C and errors leave reports of what is known by then, and no preset file."""
    began = time.monotonic()
    files = _Files.beside(arguments.out)
    files.check(is_forced=arguments.force)
    subject = subject_of(arguments, settings)
    gates = _gates(arguments, is_demonstration=subject.folder.card.demonstration)
    _check_steps(subject, settings)
    from kontextd_models.trials.choosing import choose
    from kontextd_models.trials.sweeping import Budget, Sweep

    budget = Budget(arguments.budget, spent=time.monotonic() - began)
    found = _Found(subject, Sweep(subject.cases, budget), quiet=arguments.json)
    with kept_whatever_fails(lambda: _report_broken_off(files, found, gates, quiet=arguments.json)), quiet_engine():
        found.sweep_all(settings, _precisions(arguments.precision), gates)
        choice = choose(found.sweep.points, gates, found.precisions[0])
    results, outcome = _report(files, found, gates, choice)
    _write_table(files.table, found, gates, choice, outcome.in_a_sentence(), is_forced=arguments.force)
    told_of = f"presets: {files.table}, for KONTEXTD_PRESETS or --presets\nreport:  {files.report}"
    print(json.dumps(results, indent=2) if arguments.json else f"{outcome.as_text()}\n\n{told_of}")
    return 0


@dataclass(frozen=True)
class _Files:
    """The table, and beside it what it was chosen by."""

    table: Path
    report: Path
    results: Path

    @classmethod
    def beside(cls, table: Path) -> _Files:
        return cls(table, table.with_name(f"{table.stem}-report.html"), table.with_name(f"{table.stem}-results.json"))

    def check(self, *, is_forced: bool) -> None:
        """Raises `UsageError`, before anything is measured."""
        if not self.table.parent.is_dir() or not os.access(self.table.parent, os.W_OK):
            raise UsageError(f"--out {self.table} cannot be written; name a file in a folder that exists.")
        for file in (self.table, self.report, self.results):
            if file.is_dir() or (file.exists() and not is_forced):
                raise UsageError(f"{file} is there already; name another with --out, or replace it with --force.")


def _gates(arguments: argparse.Namespace, *, is_demonstration: bool) -> Gates:
    defaults = _GATES_OF_DEMONSTRATION if is_demonstration else _GATES
    given = {Acceleration.REGULAR: arguments.regular_psnr, Acceleration.HIGH: arguments.high_psnr}
    gates = {name: defaults[name] if gate is None else gate for name, gate in given.items()}
    for name, gate in gates.items():
        if not 0 < gate <= _MOST_DB:  # NaN fails too
            raise UsageError(f"--{name.value}-psnr is {gate:g}; it must be a number above 0, up to {_MOST_DB:g}.")
    return gates


def _check_steps(subject: Subject, settings: Settings) -> None:
    """Raises `UsageError` where there is nothing to try: every row runs so few steps in full."""
    from kontextd_models.acceleration.table import presets_of
    from kontextd_models.request import MAX_STEPS
    from kontextd_models.trials.candidates import candidates

    steps, present = subject.manner.steps, presets_of(subject.folder.path, settings.presets).rows
    if candidates(steps, present):
        return
    enough = next(more for more in range(steps + 1, MAX_STEPS + 1) if candidates(more, present))
    why = "nothing can be left out of one step" if steps == 1 else f"no row leaves anything out of {steps} steps"
    raise UsageError(f"--steps is {steps}; {why}. Give {enough} or more, as many as edits are to have.")


def _precisions(asked: Sequence[str]) -> list[str]:
    """Full first, where it is among them: what all is held against. Without any, the one the engine would choose."""
    return sorted(set(asked), key=_PRECISIONS.index) or ["auto"]


class _Found:
    """What is known so far, of all precisions."""

    def __init__(self, subject: Subject, sweep: Sweep, *, quiet: bool) -> None:
        self.subject, self.sweep, self._quiet = subject, sweep, quiet
        self.head: dict[str, object] = {}
        self.none: Preset | None = None  # the row of `none`
        self.said: dict[str, None] = {}  # by the engines, each once
        self.precisions: list[str] = []

    def sweep_all(self, settings: Settings, asked: Sequence[str], gates: Gates) -> None:
        """Each precision for an even share of the time that is left, on an engine of its own."""
        from kontextd_models.memory import forget

        for number, precision in enumerate(asked):
            self._sweep_one(settings, precision, self.sweep.budget.left() / (len(asked) - number), gates)
            forget()  # the engine: the next one needs its room
        if not self.precisions:
            raise UsageError(f"--precision {' '.join(asked)} cannot be had here: {' '.join(self.said)}")

    def _sweep_one(self, settings: Settings, precision: str, seconds: float, gates: Gates) -> None:
        """Nothing, where this device cannot have the precision."""
        from kontextd_models.trials.running import Runner

        until = self.sweep.budget.left() - seconds
        told(f"loading {self.subject.folder.card.name}", quiet=self._quiet)
        engine = load_engine(replace(settings.engine_config(), precision=precision))
        if precision not in ("auto", engine.model.execution.precision):
            self.said |= dict.fromkeys(engine.model.notes)
            return
        runner = Runner(engine, self.subject.manner)
        rows = self._rows(runner)
        self.precisions.append(engine.model.execution.precision)
        left = max(0.0, self.sweep.budget.left() - until)
        try:
            self._try(runner, rows, left * (1 - _FOR_RUN_OFF))
            self._run_off(runner, gates, max(0.0, self.sweep.budget.left() - until))
        finally:
            self.said |= runner.warnings

    def _rows(self, runner: Runner) -> list[Candidate]:
        """Of the first precision the pictures of `none` are made first; another's is a row like all."""
        from kontextd_models.trials.candidates import candidates, exact

        rows = candidates(runner.manner.steps, runner.engine.presets.rows)
        if self.precisions:
            return [exact(runner.manner.steps), *rows]
        for number, case in enumerate(self.sweep.make_references(runner), 1):
            told(f"none {number}/{len(self.sweep.cases)}  {case.name}", quiet=self._quiet)
        self.head, self.none = header(runner), runner.engine.presets.rows[Acceleration.NONE]
        return rows

    def _try(self, runner: Runner, rows: Sequence[Candidate], seconds: float) -> None:
        precision = self.precisions[-1]
        what = f"{counted(len(rows), 'row')} in {precision} precision"
        told(f"{what}, for {span_text(seconds)} at the most", quiet=self._quiet)
        for point in self.sweep.run(runner, precision, rows, seconds):
            figures = f"{100 * point.ratio:5.1f} % of the time  {point.psnr:5.1f} dB"
            told(f"{figures}  {point.candidate.name}", quiet=self._quiet)

    def _run_off(self, runner: Runner, gates: Gates, seconds: float) -> None:
        from kontextd_models.trials.choosing import finalists
        from kontextd_models.trials.sweeping import TURNS

        rows = finalists([point for point in self.sweep.points if point.precision == self.precisions[-1]], gates)
        for turn in self.sweep.run_off(runner, rows, seconds):
            told(f"{counted(len(rows), 'row')} again, in turns with none: {turn}/{TURNS}", quiet=self._quiet)


def _report_broken_off(files: _Files, found: _Found, gates: Gates, *, quiet: bool) -> None:
    """Nothing, where no row was tried."""
    if found.sweep.points:
        _report(files, found, gates, None)
        told(f"report of what was measured: {files.report}", quiet=quiet)


def _report(files: _Files, found: _Found, gates: Gates, choice: Choice | None) -> tuple[dict[str, object], Outcome]:
    """Write both reports."""
    from kontextd_server.report.calibration import calibration_page
    from kontextd_server.report.outcome import Outcome

    sweep, outcome = found.sweep, Outcome.of(found.sweep, gates, choice, list(found.said))
    results = {
        **found.head,
        "warnings": list(found.said),
        "budget_s": sweep.budget.seconds,
        "precisions": found.precisions,
        "cases": [case.name for case in sweep.cases],
        "none_denoise_s": round(sweep.reference_denoise_s, 4),
        **outcome.as_json(),
        **{
            key: [{"precision": name, "name": row.name} for name, row in rows]
            for key, rows in (("not_reached", sweep.not_reached), ("too_large", sweep.too_large))
        },
    }
    subject = {
        **facts_of(found.head, sweep.cases),
        "none": f"{sweep.reference_denoise_s:.2f} s of denoising, median",
        "budget": span_text(sweep.budget.seconds),
    }
    replace_whole(files.results, (json.dumps(results, indent=2) + "\n").encode())
    replace_whole(files.report, calibration_page(subject, outcome).encode())
    return results, outcome


def _write_table(path: Path, found: _Found, gates: Gates, choice: Choice, measured: str, *, is_forced: bool) -> None:
    """Whole or not at all. Raises `UsageError` where a file has come up meanwhile."""
    from kontextd_models.trials.settling import rows_of, table_of

    assert found.none is not None  # an engine was loaded: there is a choice
    steps, model = found.subject.manner.steps, found.subject.folder.card.name
    about = (
        f"Settled by kontextd calibrate on {found.head['date']} for {model}, {choice.precision} precision, "
        f"{counted(steps, 'step')}, {counted(len(found.sweep.cases), 'edit')} by each row: {measured}."
    )
    table = table_of(about, choice.precision, rows_of(choice, found.none, gates, steps))
    data = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        (replace_whole if is_forced else create_whole)(path, data)
    except FileExistsError as error:
        raise UsageError(f"{path} has come up meanwhile; use another --out, or replace it with --force.") from error
