"""What sizes a model takes. Data beside the model (`kontextd.json` in its folder); knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kontextd_models.errors import ModelError

# The 17 sizes FLUX.1 Kontext was trained at, width × height (BFL's and diffusers' PREFERRED_KONTEXT_RESOLUTIONS).
_KONTEXT_PORTRAIT = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
KONTEXT_PREFERRED_SIZES = (
    *_KONTEXT_PORTRAIT,
    (1024, 1024),
    *((height, width) for width, height in reversed(_KONTEXT_PORTRAIT)),
)


@dataclass(frozen=True)
class ModelLimits:
    """Areas in pixels, sides in pixels, aspect as width / height (and its inverse).

    Raises `ValueError` for values no size can satisfy. `max_area` may lie under `native_area`: an operator's ceiling.
    """

    preferred_sizes: tuple[tuple[int, int], ...] = KONTEXT_PREFERRED_SIZES  # (width, height)
    native_area: int = 1024 * 1024
    max_area: int = 2 * 1024 * 1024
    min_area: int = 256 * 256
    max_aspect: float = 4.0
    min_input_side: int = 64
    grid: int = 16  # VAE factor 8 × packing 2

    def __post_init__(self) -> None:
        for name in ("native_area", "max_area", "min_area", "min_input_side", "grid"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 1 <= self.max_aspect < math.inf:  # NaN fails too
            raise ValueError(f"max_aspect is {self.max_aspect}; it must be a finite number of at least 1.")
        if self.max_area < 2 * self.min_area:  # nearer to each other, some aspects have no size on the grid
            raise ValueError(f"max_area is {self.max_area}; it must be at least twice the min_area of {self.min_area}.")
        if not self.preferred_sizes:
            raise ValueError("preferred_sizes is empty; it must name at least one (width, height).")
        for size in self.preferred_sizes:
            if min(size) <= 0 or size[0] % self.grid or size[1] % self.grid:
                raise ValueError(f"preferred_sizes holds {size}; both sides must be multiples of {self.grid}.")


def limits_from_json(data: Mapping[str, object]) -> ModelLimits:
    """The limits of a model from the object `limits` of its `kontextd.json`; what is left out has Kontext's value.

    Raises `ModelError` for an unknown key, a value of the wrong type, or limits no size can satisfy.
    """
    known = [field.name for field in fields(ModelLimits)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ModelError(f"limits: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}.")
    values = {key: _parsed(key, value) for key, value in data.items()}
    try:
        # Any: each value was parsed to the type of its own field just above.
        return ModelLimits(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ModelError(f"limits: {error}") from error


def _parsed(key: str, value: object) -> int | float | tuple[tuple[int, int], ...]:
    if key == "preferred_sizes":
        if isinstance(value, list | tuple):
            return tuple(_size(pair) for pair in value)
        raise ModelError(f"limits: preferred_sizes is {value!r}; it must be a list of [width, height] pairs.")
    if type(value) is int or (type(value) is float and key == "max_aspect"):  # a bool is no number of pixels
        return value
    raise ModelError(f"limits: {key} is {value!r}; it must be a {'' if key == 'max_aspect' else 'whole '}number.")


def _size(pair: object) -> tuple[int, int]:
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int for side in pair):
        return pair[0], pair[1]
    raise ModelError(f"limits: preferred_sizes holds {pair!r}; it must hold [width, height] pairs of whole numbers.")
