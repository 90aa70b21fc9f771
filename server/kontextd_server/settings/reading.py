"""What an operator sets by environment variable: one frozen record, read once and passed in. Knows no torch, no files.

Each field of `Settings` is one `KONTEXTD_*` variable, parsed and documented by its row; `kontextd --help` prints them.
A command-line option of the same name goes before the variable.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from kontextd_models import EngineConfig, MemoryMode, SafetyConfig

PREFIX = "KONTEXTD_"
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
_MIB = 2**20


class SettingError(ValueError):
    """A variable holds a value it cannot have; the message names the variable, the value and the remedy."""


@dataclass(frozen=True)
class Row:
    """How the text of a variable becomes its value, and what it is for. `parse` raises `ValueError` with the remedy."""

    parse: Callable[[str], object]
    doc: str


def _flag(text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ValueError("use 1 or 0")


def _count(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    raise ValueError("use a whole number, 0 or above")


def _area(text: str) -> int:
    if (area := _count(text)) > 0:
        return area
    raise ValueError("use a number of pixels above 0, for example 1048576")


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:  # NaN fails too
        return value
    raise ValueError("use a number from 0 to 1")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 < value < math.inf:  # NaN fails too
        return value
    raise ValueError("use a number of seconds above 0")


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        raise ValueError(f"use one of {', '.join(names)}")

    return parse


def _memory_mode(text: str) -> MemoryMode:
    return MemoryMode(_one_of(*MemoryMode)(text))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class Settings:
    """All settings, with their defaults."""

    model: Annotated[Path | None, Row(Path, "diffusers folder; without it the embedded demonstration model")] = None
    device: Annotated[str, Row(str, "auto, cpu, cuda or cuda:1")] = "auto"
    dtype: Annotated[str, Row(_one_of("auto", "bfloat16", "float32"), "auto (bfloat16 on CUDA), bfloat16, float32")] = (
        "auto"
    )
    memory_mode: Annotated[MemoryMode, Row(_memory_mode, "where weights live: " + ", ".join(MemoryMode))] = (
        MemoryMode.AUTO
    )
    max_area: Annotated[int | None, Row(_area, "ceiling of an edit in pixels; without it the model's own")] = None
    prompt_cache_mib: Annotated[int, Row(_count, "memory for prompt embeddings, MiB; 0 keeps none")] = 256
    reference_cache_mib: Annotated[int, Row(_count, "memory for reference latents, MiB; 0 keeps none")] = 256
    safety_checkers: Annotated[
        tuple[str, ...], Row(_names, '"embedded" or folders of checkers, comma-separated; one flag is enough')
    ] = ("embedded",)
    safety_threshold: Annotated[float, Row(_probability, "probability from which the embedded checker flags")] = 0.8
    safety_check_inputs: Annotated[bool, Row(_flag, "1 also checks the input image")] = False
    safety_forced: Annotated[bool, Row(_flag, "1 also checks where a request switches the checker off")] = False
    safety_time_limit_s: Annotated[float, Row(_seconds, "a checker that takes longer fails the edit")] = 60.0
    log_level: Annotated[str, Row(_one_of("DEBUG", "INFO", "WARNING", "ERROR"), "what goes to stderr")] = "WARNING"
    debug: Annotated[bool, Row(_flag, "1 shows a traceback with every error")] = False

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            memory_mode=self.memory_mode,
            max_area=self.max_area,
            prompt_cache_bytes=self.prompt_cache_mib * _MIB,
            reference_cache_bytes=self.reference_cache_mib * _MIB,
            safety=SafetyConfig(
                checkers=self.safety_checkers,
                threshold=self.safety_threshold,
                check_inputs=self.safety_check_inputs,
                forced=self.safety_forced,
                time_limit_s=self.safety_time_limit_s,
            ),
        )


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings of an environment. An empty variable counts as absent.

    Raises `SettingError` for a value a variable cannot have, and for a `KONTEXTD_*` variable that does not exist: a
    mistyped `KONTEXTD_SAFETY_FORCED` must not pass in silence.
    """
    rows = {variable(name): (name, row) for name, row in _rows().items()}
    values: dict[str, object] = {}
    for name, text in environment.items():
        if not name.startswith(PREFIX) or not text.strip():
            continue
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            raise SettingError(
                f"{name} is no setting; {f'did you mean {near[0]}?' if near else 'see kontextd --help.'}"
            )
        key, row = rows[name]
        try:
            values[key] = row.parse(text.strip())
        except ValueError as error:
            raise SettingError(f"{name} is {text!r}: {error}.") from error
    # Each value was made by the parser of its own field.
    return Settings(**values)  # type: ignore[arg-type]


def variable(name: str) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + name.upper()


def describe() -> str:
    """One line a variable, for `--help` and the documentation."""
    return "\n".join(f"  {variable(name):29} {row.doc}" for name, row in _rows().items())


def _rows() -> dict[str, Row]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: next(part for part in get_args(hint) if isinstance(part, Row)) for name, hint in hints.items()}
