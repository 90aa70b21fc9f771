"""From edits compared one by one to rows, gates and tables. Knows numbers; knows no engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from acceleration.measuring import Compared


@dataclass(frozen=True)
class Gate:
    """The least PSNR to `none` and the most lost against the exact edit, both in dB; the least ratio of times."""

    to_none: float
    exact_loss: float
    speed: float


GATES: Mapping[str, Gate] = {"regular": Gate(35, 0.5, 1.8), "high": Gate(30, 1.0, 3.0)}
UNTOUCHED_LOSS = 0.5  # dB, of either preset on any photo
STOCK_SPEED = 1.03  # of `none` over the stock pipeline
OTHER_GATES = {"untouched_loss": UNTOUCHED_LOSS, "stock_speed": STOCK_SPEED}


@dataclass(frozen=True)
class Row:
    """A preset on one instruction: means over photos in dB, and the worst photo."""

    preset: str
    instruction: str
    kind: str
    photos: int
    to_none: float
    worst_to_none: float
    ssim: float
    exact_of_none: float | None
    exact_loss: float | None
    untouched_loss: float | None
    worst_untouched_loss: float | None

    def misses(self) -> list[str]:
        """What falls short of the gates."""
        gate = GATES[self.preset]
        told = [] if self.to_none >= gate.to_none else [f"{self.to_none:.1f} dB to none, below {gate.to_none:g}"]
        if self.exact_loss is not None and not self.exact_loss <= gate.exact_loss:
            told.append(f"loses {self.exact_loss:.2f} dB against the exact edit, more than {gate.exact_loss:g}")
        worst = self.worst_untouched_loss
        if worst is not None and not worst <= UNTOUCHED_LOSS:
            told.append(f"loses {worst:.2f} dB in the untouched region of a photo, more than {UNTOUCHED_LOSS:g}")
        return [f"{self.preset}, {self.instruction}: {what}" for what in told]


@dataclass(frozen=True)
class Summary:
    """A way over all its edits: steps and FLOPs as it took them, PSNR to `none` apart for random instructions."""

    group: str
    name: str
    edits: int
    computed: float
    flops: float  # share of all steps in full
    to_none: float
    to_none_random: float
    worst_instruction: float
    ssim: float
    exact_loss: float


def rows(preset: str, compared: Iterable[Compared]) -> list[Row]:
    return [_row(preset, of_one) for of_one in by_instruction(compared).values()]


def by_instruction(compared: Iterable[Compared]) -> Mapping[str, list[Compared]]:
    grouped: dict[str, list[Compared]] = {}
    for one in compared:
        grouped.setdefault(one.case.instruction, []).append(one)
    return grouped


def summary(group: str, name: str, compared: Sequence[Compared]) -> Summary:
    random = [one.way.to_none for one in compared if one.case.kind == "random"]
    others = [one.way.to_none for one in compared if one.case.kind != "random"]
    means = [_mean(of_one, lambda one: one.way.to_none) for of_one in by_instruction(compared).values()]
    return Summary(
        group,
        name,
        len(compared),
        computed=statistics.fmean(one.way.computed for one in compared),
        flops=statistics.fmean(one.way.flops for one in compared),
        to_none=statistics.fmean(others),
        to_none_random=statistics.fmean(random),
        worst_instruction=min(mean for mean in means if mean is not None),
        ssim=statistics.fmean(one.way.ssim for one in compared),
        exact_loss=statistics.fmean(one.exact_loss for one in compared if one.exact_loss is not None),
    )


def table(of: Sequence[Row]) -> str:
    """Markdown, one line an instruction and preset."""
    lines = [
        "| Instruction | Preset | To none, dB | Worst photo, dB | SSIM | Exact edit by none, dB | Lost, dB |"
        " Untouched region, lost, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {row.instruction: place for place, row in enumerate(of)}
    for row in sorted(of, key=lambda row: order[row.instruction]):
        cells = (
            f"{row.to_none:.1f}",
            f"{row.worst_to_none:.1f}",
            f"{row.ssim:.4f}",
            _shown(row.exact_of_none, ".1f"),
            _shown(row.exact_loss, ".2f"),
            _shown(row.untouched_loss, ".2f"),
        )
        lines.append(f"| {row.instruction} | {row.preset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ways_table(of: Sequence[Summary]) -> str:
    """Markdown, one line a way."""
    lines = [
        "| Way | Steps | FLOPs | To none, dB | Random kind, dB | Worst instruction, dB | SSIM | Exact edit, lost, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in of:
        lines.append(
            f"| {row.group}: {row.name} | {row.computed:.1f} | {row.flops:.0%} | {row.to_none:.1f} |"
            f" {row.to_none_random:.1f} | {row.worst_instruction:.1f} | {row.ssim:.4f} | {row.exact_loss:.2f} |"
        )
    return "\n".join(lines)


def speed_misses(speed: Mapping[str, Mapping[str, float]]) -> list[str]:
    over_none = [(name, "ratio", gate.speed) for name, gate in GATES.items()]
    return [
        f"{name}: {kind} {speed[name][kind]:.3f}, below {least:g}"
        for name, kind, least in [("none", "stock_ratio", STOCK_SPEED), *over_none]
        if not speed[name][kind] >= least
    ]


def _row(preset: str, of_one: Sequence[Compared]) -> Row:
    case = of_one[0].case
    untouched = [one.untouched_loss for one in of_one if one.untouched_loss is not None]
    return Row(
        preset,
        case.instruction,
        case.kind,
        len(of_one),
        to_none=statistics.fmean(one.way.to_none for one in of_one),
        worst_to_none=min(one.way.to_none for one in of_one),
        ssim=statistics.fmean(one.way.ssim for one in of_one),
        exact_of_none=_mean(of_one, lambda one: one.none.exact),
        exact_loss=_mean(of_one, lambda one: one.exact_loss),
        untouched_loss=_mean(of_one, lambda one: one.untouched_loss),
        worst_untouched_loss=max(untouched, default=None),
    )


def _mean(of: Sequence[Compared], value: Callable[[Compared], float | None]) -> float | None:
    found = [number for one in of if (number := value(one)) is not None]
    return statistics.fmean(found) if found else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
