"""fal's names: input and output of the endpoint as pydantic models. The one place where the wire's names are written.

Defaults and values are those of fal's page for `fal-ai/flux-kontext-lora`, and so are the schema names of the OpenAPI
document. Unknown fields are ignored, as there: callers send them. Numbers in strings are read, as there, and booleans
as the numbers 1 and 0, as pydantic does: `scale: wanted && 0.8` is ordinary JavaScript.

`AccelerationEnum` and `ResolutionModeEnum` repeat the engine's `Acceleration` and `ResolutionMode`: pydantic takes the
document's schema names from the classes, fal's names are these, and an enum with members has no subclasses. A test
holds them together.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints

MAX_SAFE_SEED = 2**53 - 1  # JavaScript rounds larger ones
MAX_SIDE = 14142


class OutputFormatEnum(StrEnum):
    JPEG = "jpeg"
    PNG = "png"


class AccelerationEnum(StrEnum):
    NONE = "none"
    REGULAR = "regular"
    HIGH = "high"


class ResolutionModeEnum(StrEnum):
    AUTO = "auto"
    MATCH_INPUT = "match_input"
    R1_1 = "1:1"
    R16_9 = "16:9"
    R21_9 = "21:9"
    R3_2 = "3:2"
    R2_3 = "2:3"
    R4_5 = "4:5"
    R5_4 = "5:4"
    R3_4 = "3:4"
    R4_3 = "4:3"
    R9_16 = "9:16"
    R9_21 = "9:21"


class WireModel(BaseModel):
    """What all models of the wire have in common."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


Address = Annotated[str, StringConstraints(min_length=1)]


class LoraWeight(WireModel):
    path: Address = Field(
        description="URL of the weights, an uploaded file, a path under a named local root, or a hub id."
    )
    scale: float = Field(1.0, description="Factor of the weights when they are merged with the base model.")


class FluxKontextLoraInput(WireModel):
    image_url: Address = Field(
        description="The image to edit: a URL, a data URI or an uploaded file. At most 14142 × 14142 px, 20 s to fetch."
    )
    prompt: str = Field(description="What to do with the image.", examples=["Turn the sky into a sunset."])
    num_inference_steps: int = Field(30, ge=1, le=50, description="The number of denoise steps.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SAFE_SEED, description="The same seed, prompt and version give the same image."
    )
    guidance_scale: float = Field(2.5, ge=0, le=20, description="How closely the image follows the prompt.")
    sync_mode: bool = Field(False, description="Return data URIs, and keep neither images nor payload.")
    num_images: int = Field(1, ge=1, le=4, description="The number of images to make.")
    enable_safety_checker: bool = Field(True, description="Replace images that are not safe by black ones.")
    output_format: OutputFormatEnum = Field(OutputFormatEnum.PNG, description="The format of the images.")
    # FailFast: a million wrong elements are one error.
    loras: Annotated[list[LoraWeight], FailFast()] = Field(
        default_factory=list, description="The LoRAs to use. Any number of them, merged together."
    )
    acceleration: AccelerationEnum = Field(AccelerationEnum.NONE, description="The preset: higher is faster.")
    resolution_mode: ResolutionModeEnum = Field(
        ResolutionModeEnum.MATCH_INPUT,
        description="How the output size follows from the input: the model's nearest preferred size (auto), "
        "the input's own rounded to the grid (match_input), or a ratio.",
    )


class ImageSize(WireModel):
    """Of the text-to-image sibling."""

    width: int = Field(512, gt=0, le=MAX_SIDE, description="The width of the generated image.")
    height: int = Field(512, gt=0, le=MAX_SIDE, description="The height of the generated image.")


class Image(WireModel):
    url: str = Field(description="Where the file is; a data URI in sync mode and in previews.")
    width: int | None = None
    height: int | None = None
    content_type: str | None = Field(None, description="The type of the bytes.", examples=["image/png"])
    file_name: str | None = None
    file_size: int | None = Field(None, description="In bytes.")


class LoraReport(WireModel):
    """How much of a LoRA fitted the model."""

    path: str
    matched: int
    total: int
    warnings: list[str] = Field(default_factory=list)


class PresetReport(WireModel):
    """What the preset did: steps computed in full, from the cache, and skipped."""

    name: str
    full: int
    cached: int
    skipped: int


class SizeReport(WireModel):
    """Width and height that were asked for and that were made, and why they differ."""

    asked: tuple[int, int] | None = None
    planned: tuple[int, int]
    reason: str | None = None


class KontextdReport(WireModel):
    """What fal does not tell."""

    loras: list[LoraReport] = Field(default_factory=list)
    preset: PresetReport | None = None
    cache_hits: dict[str, bool] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    size: SizeReport | None = None
    version: str | None = None


class FluxKontextLoraOutput(WireModel):
    images: list[Image] = Field(description="The images.")
    timings: dict[str, float] = Field(description="Seconds by stage.")
    seed: int = Field(description="The seed that was used.")
    has_nsfw_concepts: list[bool] = Field(description="Of each image whether it was replaced by a black one.")
    prompt: str = Field(description="The prompt as it was sent.")
    kontextd: KontextdReport | None = Field(None, description="What was done, in detail. The operator can turn it off.")
