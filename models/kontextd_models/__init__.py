"""The engine of kontextd: FLUX.1 Kontext edits through one door. Knows no HTTP, no URLs, no job ids.

`load_engine(EngineConfig) -> Engine`; `Engine.edit(EditRequest)` yields `Step`s and then one `Done`.
Importing this package is light: torch comes in with the first `load_engine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kontextd_models.records import (
    Acceleration,
    Done,
    EditRequest,
    EngineConfig,
    LoraLimits,
    LoraReport,
    LoraWeight,
    MemoryMode,
    PresetUse,
    ResolutionMode,
    SafetyConfig,
    Step,
)

if TYPE_CHECKING:
    from kontextd_models.engine import Engine

__all__ = [
    "Acceleration",
    "Done",
    "EditRequest",
    "EngineConfig",
    "LoraLimits",
    "LoraReport",
    "LoraWeight",
    "MemoryMode",
    "PresetUse",
    "ResolutionMode",
    "SafetyConfig",
    "Step",
    "load_engine",
]


def load_engine(config: EngineConfig) -> Engine:
    """Load a model and return the engine around it.

    Raises `errors.ModelError` naming the file where the folder is missing a part, truncated, or of another
    architecture. Nothing is downloaded.
    """
    from kontextd_models.engine import Engine

    return Engine.load(config)
