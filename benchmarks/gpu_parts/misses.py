"""What is not as promised: goals missed, graphs compiled again, ways fallen back. Knows results; measures nothing.

What was not measured is neither met nor missed, and is not told here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_parts.parts import Part
from gpu_parts.supervise import Result


@dataclass(frozen=True)
class MissedGoal:
    part: str
    seconds: float
    goal_s: float


@dataclass(frozen=True)
class CompiledAgain:
    """After the warm-up: the part's seconds have the compiler's in them."""

    part: str
    graphs: int


@dataclass(frozen=True)
class Misses:
    """`goals` and `fell_back` are None where they say nothing: they are for the full size on a GPU."""

    goals: tuple[MissedGoal, ...] | None
    recompiled: tuple[CompiledAgain, ...]
    fell_back: tuple[str, ...] | None  # the engine's notes: what could not be had there, or failed

    @classmethod
    def of(cls, parts: Sequence[Part], results: Mapping[str, Result], *, with_goals: bool) -> Misses:
        figures = [(part, results[part.name]["figures"]) for part in parts if "figures" in results.get(part.name, {})]
        missed = tuple(
            MissedGoal(part.name, found["seconds"], part.goal_s)
            for part, found in figures
            if part.goal_s is not None and found["seconds"] > part.goal_s
        )
        recompiled = tuple(
            CompiledAgain(part.name, found["recompiled"]) for part, found in figures if found.get("recompiled", 0)
        )
        told = (found["execution"]["notes"] for _, found in figures if "execution" in found)
        fell_back = tuple(dict.fromkeys(note for notes in told for note in notes))
        return cls(missed, recompiled, fell_back) if with_goals else cls(None, recompiled, None)

    def lines(self) -> Iterator[str]:
        """For people, in Markdown; none where nothing is missed."""
        if self.goals:
            yield "\nGoals missed:\n"
            yield from (f"- {one.part}: {one.seconds:.3f} s, the goal is ≤ {one.goal_s} s" for one in self.goals)
        if self.recompiled:
            yield "\nCompiled again after the warm-up, in graphs:\n"
            yield from (f"- {one.part}: {one.graphs}" for one in self.recompiled)
        if self.fell_back:
            yield "\nFell back:\n"
            yield from (f"- {note}" for note in self.fell_back)
