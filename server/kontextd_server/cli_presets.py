"""`kontextd presets`: what the presets of a model do, step by step, and what that saves. Knows no torch."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill, wrap
from typing import TYPE_CHECKING

from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.acceleration.cost import Shape
    from kontextd_models.acceleration.planning import Plan
    from kontextd_models.acceleration.preset import Guard, Preset
    from kontextd_models.folder import ModelFolder

_STEPS = 28
_WIDTH = 100  # of running text
_INDENT = 9
_MOST_TEXT_TOKENS = 512  # that T5 reads for FLUX
_LEGEND = "F every token   c text and output tokens, keys and values of the reference kept   . skipped, forecast"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=_STEPS, help="to show the presets for; default: %(default)s")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Reads the model's headers and its table, no weights."""
    from kontextd_models.acceleration.planning import plan
    from kontextd_models.acceleration.table import presets_of
    from kontextd_models.embedded import embedded_model_dir
    from kontextd_models.folder import check_folder
    from kontextd_models.request import MAX_STEPS

    if not 1 <= arguments.steps <= MAX_STEPS:
        raise UsageError(f"--steps is {arguments.steps}; it must be a whole number from 1 to {MAX_STEPS}.")
    folder = check_folder(settings.model or embedded_model_dir())
    table, shape = presets_of(folder.path, settings.presets), _shape(folder)
    rows = [_told(name.value, row, plan(row, arguments.steps), shape) for name, row in table.rows.items()]
    if arguments.json:
        head = {"model": folder.card.name, "file": str(table.file), "about": table.about, "precision": table.precision}
        print(json.dumps({**head, "steps": arguments.steps, "presets": [row.as_json() for row in rows]}, indent=2))
        return 0
    print(f"{folder.card.name}, {arguments.steps} steps, an output and a reference of the native area")
    print(f"from {table.file}, {f'for {table.precision}' if table.precision else 'for any precision'}")
    if table.about:
        print(fill(table.about, _WIDTH))
    for row in rows:
        print(f"\n{row.name:{_INDENT}}{row.summary}")
        print("\n".join(f"{'':{_INDENT}}{line}" for line in row.lines()))
    print(f"\n{_LEGEND}")
    return 0


@dataclass(frozen=True)
class _Told:
    """A preset for a number of steps; the shares are of the FLOPs of `none`."""

    name: str
    row: Preset
    plan: Plan
    share: float
    share_at_most: float  # where the guard spends all of its steps

    def lines(self) -> Iterator[str]:
        yield self.mask
        counts = f"{self._count('F')} full  {self._count('c')} cached  {self._count('.')} skipped"
        yield f"{counts}  {self.share:.1%} of the FLOPs"
        if self._count(".") and self.plan.forecast_order == 0:
            yield "a skipped step takes the last velocity"
        if self.plan.guard is not None:
            yield from wrap(self._guard(self.plan.guard), _WIDTH - _INDENT)

    def as_json(self) -> dict[str, object]:
        from kontextd_models.acceleration.table import row_as_json

        return {
            "name": self.name,
            "summary": self.summary,
            "mask": self.mask,
            "full": self._count("F"),
            "cached": self._count("c"),
            "skipped": self._count("."),
            "flops_share": round(self.share, 4),
            "flops_share_at_most": round(self.share_at_most, 4),
            "extra_steps_at_most": self.plan.extra_steps_at_most,
            "guard_may_run": self.guard_may_run,
            "row": row_as_json(self.row),
        }

    @property
    def mask(self) -> str:
        return "".join(self.plan.kinds)

    @property
    def summary(self) -> str:
        """The table's, else what the row does in so many steps."""
        from kontextd_models.trials.candidates import summary_of

        return self.row.summary or summary_of(self.row, len(self.mask))

    @property
    def guard_may_run(self) -> list[int]:
        """Steps counted from 1."""
        return [step + 1 for step in self.plan.may_run_too]

    def _guard(self, guard: Guard) -> str:
        if not self.guard_may_run:
            return f"guard: adds no step, as none is skipped after {self.plan.forecast_order + 2} that ran"
        most, of = self.plan.extra_steps_at_most, ", ".join(map(str, self.guard_may_run))
        return (
            f"guard: adds at most {most} {'step' if most == 1 else 'steps'}, of {of} (counted from 1), each where the "
            f"forecast of the one before was off by more than {100 * guard.residual:.3g}%: then up to "
            f"{self.share_at_most:.1%} of the FLOPs"
        )

    def _count(self, kind: str) -> int:
        return Counter(self.mask)[kind]


def _told(name: str, row: Preset, planned: Plan, shape: Shape) -> _Told:
    from kontextd_models.acceleration.cost import at_most, share

    least, most = (share(shape, kinds, trimmed=row.trim_last_block) for kinds in (planned.kinds, at_most(planned)))
    return _Told(name, row, planned, least, most)


def _shape(folder: ModelFolder) -> Shape:
    """The model's transformer, for an output and a reference of its native area."""
    from kontextd_models.acceleration.cost import Shape
    from kontextd_models.folder import read_json

    limits, read = folder.card.limits, read_json(folder.path / "tokenizer_2" / "tokenizer_config.json")
    most = read.get("model_max_length")
    text_tokens = min(most, _MOST_TEXT_TOKENS) if isinstance(most, int) else _MOST_TEXT_TOKENS
    tokens = limits.native_area // limits.grid**2
    return Shape.of(read_json(folder.path / "transformer" / "config.json"), tokens, tokens, text_tokens)
