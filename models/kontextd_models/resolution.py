"""Resolution planning: which size an edit is made at. Pure numbers; knows no images, no torch, no files.

Aspect is width / height, and an aspect error is the factor by which one side is stretched against the other, less one.
What follows from the rules below (the tests hold every figure, over all aspects from 1:4 to 4:1):

| mode | aspect error, native 1024², ceiling 2 · 1024² | native 256², ceiling 512² |
|---|---|---|
| `match_input`, within the limits | rounding alone: at most 8 px a side | the same |
| `match_input`, over the ceiling | ≤ 0.8 % | ≤ 2.1 % |
| `match_input`, under the floor | ≤ 3.8 % | ≤ 7.3 % |
| `auto`, between the extreme preferred sizes | ≤ 8.2 % (half the gap from 944×1104 to 1:1) | ≤ 9.5 % |
| a ratio: the output against that ratio | ≤ 1 %, area within 6 % | ≤ 1.6 %, area within 18 % |
| a reference with a grid of its own | ≤ 1.1 % | ≤ 4.3 % |

A reference on the output's grid is stretched by what the output's aspect differs from the input's, and by no more than
5 % where a ratio was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kontextd_models.errors import AspectRatioOutOfRange, ImageTooSmall
from kontextd_models.limits import KONTEXT_PREFERRED_SIZES, ModelLimits
from kontextd_models.records import ResolutionMode

Size = tuple[int, int]  # (width, height) in pixels

_SHARED_GRID_TOLERANCE = 1.05  # up to this stretch the reference lies on the output's grid
_RATIO_TOLERANCE = 0.01
_AREA_TOLERANCE = 0.06
# A stretched picture is worse than a smaller one: 1 % of aspect weighs as much as 4 % of scale.
_SCALE_WEIGHT = 0.25


@dataclass(frozen=True)
class SizePlan:
    """The size of the output, and of the reference the model sees. `asked` is the input's own (width, height).

    `reason` is empty where output and reference are simply the input rounded to the grid, else one sentence to log.
    """

    width: int
    height: int
    reference_width: int
    reference_height: int
    asked: Size
    reason: str = ""


def plan(mode: ResolutionMode, width: int, height: int, limits: ModelLimits) -> SizePlan:
    """Plan the edit of a `width` × `height` input. Nothing is cropped or padded, and no area is ever over the ceiling.

    Raises `ImageTooSmall` and `AspectRatioOutOfRange`, naming the limit.
    """
    _check_input(width, height, limits)
    output, why = _output(mode, width, height, limits)
    reference = _reference(mode, width, height, output, limits)
    reason = ""
    if not output == reference == _rounded(width, height, limits.grid):
        reason = f"the {width}x{height} input is edited at {output[0]}x{output[1]}: {why}"
        if reference != output:
            stretch = _percent(_stretch(reference, width / height))
            reason += f"; its reference keeps its own aspect at {reference[0]}x{reference[1]} ({stretch} off)"
    return SizePlan(*output, *reference, asked=(width, height), reason=reason)


def preferred_sizes(native_area: int, grid: int = 16) -> tuple[Size, ...]:
    """Kontext's 17 preferred aspects on the grid at another native area, narrowest first, without doubles."""
    bounds = ModelLimits(native_area=native_area, max_area=2 * native_area, min_area=native_area // 2, grid=grid)
    found = {_nearest(width / height, native_area, bounds) for width, height in KONTEXT_PREFERRED_SIZES}
    return tuple(sorted(found, key=lambda size: size[0] / size[1]))


def _check_input(width: int, height: int, limits: ModelLimits) -> None:
    if min(width, height) < limits.min_input_side:
        raise ImageTooSmall(
            f"image is {width}x{height}; the smallest side allowed is {limits.min_input_side} px. Use a larger picture."
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise AspectRatioOutOfRange(
            f"image is {width}x{height}; the limit is {limits.max_aspect:g}:1 either way. Crop it first."
        )


def _output(mode: ResolutionMode, width: int, height: int, limits: ModelLimits) -> tuple[Size, str]:
    if mode is ResolutionMode.MATCH_INPUT:
        return _match_input(width, height, limits)
    if mode is ResolutionMode.AUTO:
        return _auto(width, height, limits)
    return _ratio(mode, limits)


def _match_input(width: int, height: int, limits: ModelLimits) -> tuple[Size, str]:
    rounded = _rounded(width, height, limits.grid)
    area = rounded[0] * rounded[1]
    if limits.min_area <= area <= limits.max_area and _aspect_allowed(rounded, limits):
        return rounded, f"it is rounded to the {limits.grid}-pixel grid"
    target = min(max(width * height, limits.min_area), limits.max_area)
    on_grid = f"on the {limits.grid}-pixel grid it is {rounded[0]}x{rounded[1]}"
    if area > limits.max_area:
        why = f"{on_grid}, over the model's ceiling of {limits.max_area} pixels"
    elif area < limits.min_area:
        why = f"{on_grid}, under the model's floor of {limits.min_area} pixels"
    else:
        why = f"{on_grid}, beyond the model's {limits.max_aspect:g}:1"
    return _nearest(width / height, target, limits), why


def _auto(width: int, height: int, limits: ModelLimits) -> tuple[Size, str]:
    aspect = width / height
    chosen = min(limits.preferred_sizes, key=lambda size: _stretch(size, aspect))
    why = "auto takes the nearest of the model's preferred sizes"
    if chosen[0] * chosen[1] > limits.max_area:  # an operator's ceiling may lie under the model's own sizes
        why += f", {chosen[0]}x{chosen[1]}, scaled to the ceiling of {limits.max_area} pixels"
        chosen = _nearest(chosen[0] / chosen[1], limits.max_area, limits)
    return chosen, f"{why} ({_percent(_stretch(chosen, aspect))} off the input's aspect)"


def _ratio(mode: ResolutionMode, limits: ModelLimits) -> tuple[Size, str]:
    across, down = (int(part) for part in mode.value.split(":"))
    ratio, area = across / down, min(limits.native_area, limits.max_area)
    close = [
        size
        for size in _candidates(ratio, limits, limits.min_area, limits.max_area)
        if _stretch(size, ratio) <= 1 + _RATIO_TOLERANCE and abs(size[0] * size[1] / area - 1) <= _AREA_TOLERANCE
    ]
    # At a small native area no size may be that close: then the nearest there is.
    chosen = min(close, key=lambda size: _scale_error(size, area)) if close else _nearest(ratio, area, limits)
    return chosen, f"{mode.value} was asked for ({_percent(_stretch(chosen, ratio))} off that ratio)"


def _reference(mode: ResolutionMode, width: int, height: int, output: Size, limits: ModelLimits) -> Size:
    """The output's grid, so that an edit that changes nothing comes back aligned, unless that squashes the input."""
    aspect = width / height
    if mode is ResolutionMode.MATCH_INPUT or _stretch(output, aspect) <= _SHARED_GRID_TOLERANCE:
        return output
    if mode is ResolutionMode.AUTO and _between_preferred(aspect, limits):
        return output
    native = min(limits.native_area, limits.max_area)
    return _nearest(aspect, native, limits, ceiling=native)


def _between_preferred(aspect: float, limits: ModelLimits) -> bool:
    aspects = [width / height for width, height in limits.preferred_sizes]
    return min(aspects) <= aspect <= max(aspects)


def _nearest(aspect: float, area: int, limits: ModelLimits, ceiling: int | None = None) -> Size:
    """The grid size nearest to `aspect` and `area` that is never over the ceiling, nor under the floor if possible."""
    high = limits.max_area if ceiling is None else ceiling
    fitting = _candidates(aspect, limits, limits.min_area, high) or _candidates(aspect, limits, 0, high)
    return min(fitting, key=lambda size: math.log(_stretch(size, aspect)) + _SCALE_WEIGHT * _scale_error(size, area))


def _candidates(aspect: float, limits: ModelLimits, low: int, high: int) -> list[Size]:
    """For each width on the grid the three heights around `aspect`, where area and aspect are allowed."""
    grid = limits.grid
    found = []
    for width in range(grid, math.isqrt(int(high * limits.max_aspect)) + grid, grid):
        middle = round(width / aspect / grid)
        for height in (grid * (middle - 1), grid * middle, grid * (middle + 1)):
            if height > 0 and low <= width * height <= high and _aspect_allowed((width, height), limits):
                found.append((width, height))
    return found


def _aspect_allowed(size: Size, limits: ModelLimits) -> bool:
    return max(size) <= limits.max_aspect * min(size)


def _rounded(width: int, height: int, grid: int) -> Size:
    return max(grid, (width + grid // 2) // grid * grid), max(grid, (height + grid // 2) // grid * grid)


def _stretch(size: Size, aspect: float) -> float:
    """By what factor, ≥ 1, a picture of `aspect` is stretched when it fills `size`."""
    factor = size[0] / size[1] / aspect
    return max(factor, 1 / factor)


def _scale_error(size: Size, area: int) -> float:
    return abs(math.log(size[0] * size[1] / area)) / 2


def _percent(stretch: float) -> str:
    return f"{(stretch - 1) * 100:.1f} %"
