"""The results as JSON, a table and a plot, written anew after every part. Knows results; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpu_parts.misses import Misses
from gpu_parts.parts import STEPS, Options, Part, Work
from gpu_parts.plot import Bar, bars_svg
from gpu_parts.published import OTHERS
from gpu_parts.supervise import Result

JSON_FILE, TABLE_FILE, PLOT_FILE = "gpu.json", "gpu.md", "gpu.svg"
_COLUMNS = (
    "way",
    "seconds",
    "goal",
    "full / cached / skipped step, ms",
    "TFLOP",
    "TFLOP/s",
    "peak, GB",
    "recompiled",
    "off",
)


class Report:
    """All that is known so far. `head`: when, by which command, on what kind of model."""

    def __init__(self, options: Options, head: Mapping[str, object], parts: Sequence[Part]) -> None:
        self._options, self._head, self._parts = options, dict(head), list(parts)
        self.results: dict[str, Result] = {}

    def add(self, name: str, result: Result) -> None:
        """Keep a result, and write all of them."""
        self.results[name] = result
        others = [{"name": one.name, "seconds": one.seconds, "kind": one.kind, "source": one.source} for one in OTHERS]
        goals = {part.name: part.goal_s for part in self._parts if part.goal_s}
        misses = asdict(self._misses())
        data = {**self._head, "results": self.results, "goals_s": goals, "misses": misses, "others": others}
        self._write(JSON_FILE, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        self._write(TABLE_FILE, "\n".join(self._lines()) + "\n")
        self._write(PLOT_FILE, self._plot())

    def wrong(self) -> list[str]:
        """What was missed and what was not measured, in lines for people; none where all is as promised."""
        return [*self._misses().lines(), *self._not_measured()]

    def _misses(self) -> Misses:
        return Misses.of(self._parts, self.results, with_goals=self._options.judges_goals)

    def _not_measured(self) -> Iterator[str]:
        errors = {name: result["error"] for name, result in self.results.items() if "error" in result}
        goals = {part.name: " (its goal is neither met nor missed)" for part in self._parts if part.goal_s}
        if errors:
            yield "\nNot measured:\n"
            yield from (f"- {name}{goals.get(name, '')}: {_last_line(error)}" for name, error in errors.items())

    def _goal_s(self, part: Part) -> float | None:
        return part.goal_s if self._options.judges_goals else None

    def _write(self, name: str, text: str) -> None:
        (self._options.out / name).write_text(text, encoding="utf-8")

    def _figures(self, part: Part) -> dict[str, Any] | None:
        figures: dict[str, Any] | None = self.results.get(part.name, {}).get("figures")
        return figures

    def _measured(self, work: Work) -> Iterator[tuple[Part, dict[str, Any]]]:
        for part in self._parts:
            figures = self._figures(part)
            if part.work is work and figures is not None:
                yield part, figures

    def _whole_edits(self) -> Iterator[tuple[Part, dict[str, Any]]]:
        for work in (Work.STOCK, Work.EDIT):
            yield from self._measured(work)

    def _plot(self) -> str:
        measured = [
            Bar(part.name, figures["seconds"], is_ours=part.work is Work.EDIT, mark=self._goal_s(part))
            for part, figures in self._whole_edits()
        ]
        others = [Bar(f"{one.name} ({one.kind})", one.seconds, is_ours=False) for one in OTHERS]
        title = f"{STEPS} steps, from noise to latents: {self._device()}"
        dash = "; a dash is the goal on one H100" if self._options.judges_goals else ""
        return bars_svg(title, f"seconds{dash}", [*measured, *others])

    def _device(self) -> str:
        for result in self.results.values():
            if "device" in result:
                device = result["device"]
                return str(device["name"] if isinstance(device, Mapping) else device)
        return "no device"

    def _lines(self) -> Iterator[str]:
        yield f"# {self._head['what']}"
        yield f"\n{self._device()}, {self._head['date']}, `{self._head['command']}`. Seconds from noise to latents."
        yield f"\n| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"
        yield from (_row(part, figures, self._goal_s(part)) for part, figures in self._whole_edits())
        yield "\nOff: how far the first velocity is from that of diffusers, in parts of its length. It is no fidelity."
        yield f"\n{self._goals()}"
        yield from self.wrong()
        yield from self._executions()
        yield from self._beside()
        yield "\n| others | seconds | kind | source |\n|---|---|---|---|"
        yield from (f"| {one.name} | {one.seconds:.2f} | {one.kind} | {one.source} |" for one in OTHERS)

    def _goals(self) -> str:
        missed = self._misses().goals
        if missed is None:
            return "Goals are for the full size on a GPU; nothing is said of them here."
        measured = [self._figures(part) is not None for part in self._parts if part.goal_s]
        met = sum(measured) - len(missed)
        return f"Goals: {met} met, {len(missed)} missed, {measured.count(False)} not measured."

    def _executions(self) -> Iterator[str]:
        """How the engine ran at the end of each process, and every note that it left on the way."""
        measured = [*self._measured(Work.EDIT), *self._measured(Work.SIZES)]
        for precision in ("bf16", "fp8"):
            told = [figures["execution"] for part, figures in measured if part.precision == precision]
            if told:
                notes = dict.fromkeys(note for one in told for note in (*one["notes"], *one["tried"]))
                yield f"\nOurs in {precision}: precision {told[-1]['precision']}, blocks {told[-1]['blocks']}."
                yield from (f"- {note}" for note in notes)

    def _beside(self) -> Iterator[str]:
        for _, figures in self._measured(Work.STAGES):
            stages = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in figures["stages_s"].items())
            yield f"\nBeside the steps: {stages}. No tokenizers, no safety checker, no file formats."
        for part, figures in self._measured(Work.SIZES):
            slowest = max(row["full_s"] for row in figures["sizes"])
            yield (
                f"\n{len(figures['sizes'])} preferred sizes in {part.precision}: "
                f"{figures['recompiled']} graphs compiled anew; the slowest full step {slowest * 1000:.1f} ms."
            )
        for part, figures in self._measured(Work.TRACE):
            files = ", ".join(step["file"] for step in figures["steps"].values())
            yield f"\nTraces of a step in {part.precision} (chrome://tracing, Perfetto): {files}."
        for part, figures in self._measured(Work.EDIT):
            if "merge_s" in figures:
                first, again = figures["merge_s"].values()
                yield f"\n{part.loras} LoRAs merged in {part.precision}: {first:.3f} s; off and on again {again:.3f} s."


def _row(part: Part, figures: Mapping[str, Any], goal_s: float | None) -> str:
    goal = f"≤ {goal_s}" if goal_s else ""
    off = f"{figures['distance_to_stock']:.1e}" if "distance_to_stock" in figures else ""
    steps = " / ".join(
        f"{figures['step_s'][kind] * 1000:.1f}" if kind in figures["step_s"] else "–"
        for kind in ("full", "cached", "skipped")
    )
    return (
        f"| {part.name} | {figures['seconds']:.3f} | {goal} | {steps} | {figures['tflop']:.4g} "
        f"| {figures['tflop_per_s']:.3g} | {figures['peak_bytes'] / 1e9:.1f} | {figures['recompiled']} "
        f"| {off} |"
    )


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1]
