"""One edit by one row. Knows engines and presets; measures nothing but what the engine tells, keeps nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image

from kontextd_models.acceleration.preset import SHORTCUTS, Preset
from kontextd_models.description import describe
from kontextd_models.engine import Engine
from kontextd_models.errors import InvalidValue
from kontextd_models.probe import gpus
from kontextd_models.records import Acceleration, Done, EditRequest, PresetUse
from kontextd_models.trials.cases import Case

_SLOT = Acceleration.HIGH  # the row of a table that is exchanged; which one makes no difference
_WARM_UP_STEPS = 2
_WARM_UP_ROWS = (Preset(), replace(SHORTCUTS, reuse_reference=True))  # every kind of step that runs


@dataclass(frozen=True)
class Manner:
    """What all edits of a comparison have in common."""

    steps: int = 30
    guidance_scale: float = 2.5
    seed: int = 7
    is_checked: bool = True  # by the safety checker


@dataclass(frozen=True)
class Run:
    """`timings` are those of `Done`; a picture that is flagged is black."""

    image: Image.Image
    timings: Mapping[str, float]
    use: PresetUse
    is_flagged: bool


class Runner:
    """Edits cases on an engine, each by the row it is given. `warnings` are the engine's, each once."""

    def __init__(self, engine: Engine, manner: Manner) -> None:
        self.engine, self.manner = engine, manner
        self.warnings: dict[str, None] = {}

    def run(self, case: Case, row: Preset) -> Run:
        """Raises what `Engine.edit` raises."""
        return self._run(case, row, self.manner.steps)

    def none(self, case: Case) -> Run:
        """By the engine's own row of that name."""
        return self.run(case, self.engine.presets.rows[Acceleration.NONE])

    def exact(self, case: Case) -> Run:
        """By `none`, to compare with. Raises `InvalidValue` for a case whose picture is flagged: black says nothing."""
        made = self.none(case)
        if made.is_flagged:
            raise InvalidValue(
                f"the safety checker flagged the edit of {case.name}, and black pictures cannot be compared. Use "
                "another photo or prompt, or switch the checker off.",
                field="enable_safety_checker",
            )
        return made

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Two short edits at each size and with each set of LoRAs, so that no edit that counts is the first one."""
        firsts = {(case.loras, case.size): case for case in reversed(cases)}
        for case in (case for case in cases if firsts[case.loras, case.size] is case):
            for row in _WARM_UP_ROWS:
                self._run(case, row, _WARM_UP_STEPS)

    def _run(self, case: Case, row: Preset, steps: int) -> Run:
        request = EditRequest(
            image=case.image,
            prompt=case.prompt,
            num_inference_steps=steps,
            seed=self.manner.seed,
            guidance_scale=self.manner.guidance_scale,
            loras=case.loras.loras,
            acceleration=_SLOT,
            enable_safety_checker=self.manner.is_checked,
        )
        with _row_in_place(self.engine, row), closing(self.engine.edit(request)) as events:
            for event in events:
                if isinstance(event, Done):
                    self.warnings |= dict.fromkeys(event.warnings)
                    return Run(event.images[0], event.timings, event.preset, event.has_nsfw_concepts[0])
        raise AssertionError("Engine.edit ended without Done")


def machine(engine: Engine) -> dict[str, object]:
    """The device by name, with the threads of the CPU, and what `describe` says of the model. Fit for JSON."""
    device = engine.model.device
    name = str(gpus()[device.index or 0]["name"]) if device.type == "cuda" else "CPU"
    return {
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "model": describe(engine.model),
    }


@contextmanager
def _row_in_place(engine: Engine, row: Preset) -> Iterator[None]:
    table = engine.presets
    engine.presets = replace(table, rows={**table.rows, _SLOT: row})
    try:
        yield
    finally:
        engine.presets = table
