"""The plain records that go in and out of the engine door. Knows no torch, no HTTP, no job ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from kontextd_models.intake import Intake
    from kontextd_models.resolution import SizePlan


class Acceleration(StrEnum):
    """Names of the presets, as on the wire."""

    NONE = "none"
    REGULAR = "regular"
    HIGH = "high"


class ResolutionMode(StrEnum):
    """How the output size follows from the input, as on the wire."""

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


class MemoryMode(StrEnum):
    """Where the weights live while an edit runs."""

    AUTO = "auto"
    RESIDENT = "resident"  # everything on the device
    ENCODERS_OFF = "encoders_off"  # text encoders go back to host memory after encoding
    GROUP_OFFLOAD = "group_offload"  # transformer blocks stream through the device in groups
    SEQUENTIAL = "sequential"  # one leaf module at a time


@dataclass(frozen=True)
class LoraWeight:
    """A LoRA file on the local disk and the factor its delta is multiplied by.

    `name` is what messages and reports call it; empty: the file's own name. `sha256` (hex) is that of the file, where
    whoever brought it knows it: then a file that was read before is not read again, wherever it lies now.
    """

    path: Path
    scale: float = 1.0
    name: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class LoraLimits:
    """What a LoRA file may hold; one that holds more is refused before its tensors are read."""

    max_file_bytes: int = 4 * 2**30
    max_tensors: int = 20_000  # every linear of FLUX.1 and both encoders in four tensors each: 4,000
    max_rank: int = 1024
    max_scale: float = 10.0  # of a request, either sign


@dataclass(frozen=True)
class SafetyConfig:
    """What checks images. `checkers` holds "embedded" or paths of model folders; all of them run, one flag is enough.

    `threshold` is the probability from which the embedded classifier flags an image: 2 of 732 safe photos score
    above 0.5, 1 above 0.8. A checker that does not answer within `time_limit_s` fails the edit.
    """

    checkers: tuple[str, ...] = ("embedded",)
    threshold: float = 0.8
    check_inputs: bool = False
    forced: bool = False  # a request cannot switch the checker off
    time_limit_s: float = 60.0  # a busy CPU takes a second for four images


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is loaded. `model` is a diffusers folder; None is the embedded demonstration model."""

    model: Path | None = None
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # "auto" (bfloat16 on CUDA, float32 on the CPU), "bfloat16", "float32"
    memory_mode: MemoryMode = MemoryMode.AUTO
    max_area: int | None = None  # pixels; None: the model's own ceiling
    presets: Path | None = None  # a table of presets; None: the model's own, or the one for FLUX.1 Kontext
    precision: str = "auto"  # "auto" (what the presets were settled with), "full", "fp8" (of the blocks)
    compile: str = "auto"  # "auto" (on CUDA, where the blocks lie there), "on", "off"
    compile_cache: Path | None = None  # what compiling leaves to the next start; None: where torch puts it
    attention: str = "auto"  # "auto" (on CUDA the fastest that is right), "native", "cudnn", "flash", "fa3"
    kernels: str = "auto"  # "auto" (in compiled blocks on CUDA, where they are faster), "on", "off"
    prompt_cache_bytes: int = 256 * 2**20
    reference_cache_bytes: int = 256 * 2**20
    lora_cache_bytes: int = 2 * 2**30  # of LoRA files that were read, in host memory
    lora_device_cache_bytes: int = 2 * 2**30  # of these on a GPU too, where so much is to spare
    lora_merged_cache_bytes: int = 256 * 2**20  # of whole sets of merged weights, where the weights lie
    lora_limits: LoraLimits = field(default_factory=LoraLimits)
    safety: SafetyConfig = field(default_factory=SafetyConfig)


@dataclass(frozen=True)
class EditRequest:
    """One edit. `image` is what `kontextd_models.intake.open_image` makes of bytes, or any PIL image.

    `seed` None draws one below 2**53 (a JavaScript client rounds larger ones). Image i of n has the seed `seed + i`
    and equals, to the bit, the single edit with that seed. `preview_interval` counts steps; 0 makes no previews.
    """

    image: Image.Image | Intake
    prompt: str
    num_inference_steps: int = 30
    seed: int | None = None
    guidance_scale: float = 2.5
    num_images: int = 1
    resolution_mode: ResolutionMode = ResolutionMode.MATCH_INPUT
    loras: tuple[LoraWeight, ...] = ()
    acceleration: Acceleration = Acceleration.NONE
    enable_safety_checker: bool = True
    preview_interval: int = 0


@dataclass(frozen=True)
class Step:
    """One denoise step is done. `index` runs from 1 to `total` over all images of the request."""

    index: int
    total: int
    elapsed_s: float  # since the first step began
    image_index: int = 0
    preview: Image.Image | None = None  # RGB, long side ≤ 256 px, already safety-checked


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA of the request: `matched` of its `total` tensors are used, `unmatched` names the others."""

    name: str
    key: str  # SHA-256 of the file
    scale: float
    dialects: tuple[str, ...]
    matched: int
    total: int
    unmatched: tuple[str, ...]
    was_cached: bool  # it had been read before


@dataclass(frozen=True)
class PresetUse:
    """How the steps of all images were carried out: in full, with the reference kept, or skipped and forecast."""

    name: Acceleration = Acceleration.NONE
    full: int = 0
    cached: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Done:
    """The result. `timings`: seconds by stage, encode_prompt, encode_image, merge, denoise, decode, safety, total."""

    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    has_nsfw_concepts: tuple[bool, ...]
    timings: Mapping[str, float]
    cache_hits: Mapping[str, bool]  # "prompt", "reference"; "loras": the same set was merged already
    size: SizePlan
    preset: PresetUse
    loras: tuple[LoraReport, ...] = ()
    warnings: tuple[str, ...] = ()  # e.g. a prompt cut at the encoder's limit
