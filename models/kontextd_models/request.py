"""What a request must satisfy, and the plain edit it becomes. Knows ranges and sizes; knows no torch and no model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeGuard, TypeVar

from PIL import Image

from kontextd_models.errors import InvalidValue, LoraError, LoraFileError
from kontextd_models.intake import Intake, IntakeLimits, prepare
from kontextd_models.limits import ModelLimits
from kontextd_models.lora.wording import label
from kontextd_models.records import Acceleration, EditRequest, LoraLimits, LoraWeight, ResolutionMode
from kontextd_models.resolution import SizePlan, plan

MAX_STEPS = 50
MAX_GUIDANCE = 20.0
MAX_IMAGES = 4
SEED_RANGE = 2**53  # a JavaScript client rounds larger numbers
_LORA_LIMITS = LoraLimits()

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class Edit:
    """A checked request: an upright sRGB picture, the sizes it is edited at, and a seed for each image to make."""

    image: Image.Image
    size: SizePlan
    prompt: str
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    safety_asked: bool
    preview_interval: int
    acceleration: Acceleration = Acceleration.NONE
    loras: tuple[LoraWeight, ...] = ()


def check(request: EditRequest, limits: ModelLimits, lora_limits: LoraLimits = _LORA_LIMITS) -> Edit:
    """Check every value, open and plan the image, and draw the seed where none was given. LoRA files are not opened.

    Raises an `InputError` that names the field, its value and its range.
    """
    _check_whole("num_inference_steps", request.num_inference_steps, 1, MAX_STEPS)
    check_num_images(request.num_images)
    if request.seed is not None:
        _check_whole("seed", request.seed, 0, SEED_RANGE - 1)
    _check_whole("preview_interval", request.preview_interval, 0, None)
    _check_guidance(request.guidance_scale)
    _check_prompt(request.prompt)
    acceleration = _choice("acceleration", request.acceleration, Acceleration)
    loras = _checked_loras(request.loras, lora_limits.max_scale)
    mode = _choice("resolution_mode", request.resolution_mode, ResolutionMode)
    picture = _picture(request.image, limits)
    return Edit(
        image=picture.image,
        size=plan(mode, picture.width, picture.height, limits),
        prompt=request.prompt,
        steps=request.num_inference_steps,
        guidance_scale=float(request.guidance_scale),
        seeds=seeds(request.seed, request.num_images),
        safety_asked=request.enable_safety_checker,
        preview_interval=request.preview_interval,
        acceleration=acceleration,
        loras=loras,
    )


def check_num_images(value: object) -> None:
    """Raises `InvalidValue`."""
    _check_whole("num_images", value, 1, MAX_IMAGES)


def seeds(seed: int | None, num_images: int) -> tuple[int, ...]:
    """Image i has the seed `seed + i`, from 2**53 on counted from 0 again. None draws a first one."""
    first = random.SystemRandom().randrange(SEED_RANGE) if seed is None else seed
    return tuple((first + index) % SEED_RANGE for index in range(num_images))


def _check_whole(field: str, value: object, low: int, high: int | None) -> None:
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if type(value) is not int or value < low or (high is not None and value > high):
        raise InvalidValue(f"{field} is {value!r}; it must be a whole number {bounds}.", field=field)


def _check_guidance(value: object) -> None:
    if not (_is_number(value) and 0 <= value <= MAX_GUIDANCE):  # NaN fails too
        raise InvalidValue(
            f"guidance_scale is {value!r}; it must be a number from 0 to {MAX_GUIDANCE:g}.", field="guidance_scale"
        )


def _check_prompt(value: object) -> None:
    if not isinstance(value, str):
        raise InvalidValue(f"prompt is a {type(value).__name__}; it must be a text.", field="prompt")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(f"prompt is not Unicode text: {error.reason} at {error.start}.", field="prompt") from error


def _checked_loras(loras: Sequence[LoraWeight], max_scale: float) -> tuple[LoraWeight, ...]:
    """Any number of them, each with a scale in its range and a file that is there."""
    for index, lora in enumerate(loras):
        if not _is_number(lora.scale) or not abs(lora.scale) <= max_scale:  # NaN fails too
            raise LoraError(
                f"{label(index, lora)}: scale is {lora.scale!r}; it must be a number from {-max_scale:g} to "
                f"{max_scale:g}.",
                index=index,
            )
        if not _is_file(index, lora):
            raise LoraFileError(f"{label(index, lora)}: there is no such file. Give one that is there.", index=index)
    return tuple(loras)


def _is_file(index: int, lora: LoraWeight) -> bool:
    try:
        return lora.path.is_file()
    except OSError as error:  # such as a name that is too long
        raise LoraFileError(
            f"{label(index, lora)}: {error.strerror}. Give a file that is there.", index=index
        ) from error


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _choice(field: str, value: object, choices: type[Choice]) -> Choice:
    try:
        return choices(str(value))
    except ValueError as error:
        names = ", ".join(choice.value for choice in choices)
        raise InvalidValue(f"{field} is {value!r}; it must be one of {names}.", field=field) from error


def _picture(image: object, limits: ModelLimits) -> Intake:
    if not isinstance(image, Image.Image | Intake):
        raise InvalidValue(f"image is a {type(image).__name__}; it must be a PIL image or an Intake.", field="image")
    return prepare(image, IntakeLimits.for_model(limits))
