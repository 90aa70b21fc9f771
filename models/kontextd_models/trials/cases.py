"""What rows are compared on: photos × prompts × sets of LoRAs, at exact sizes. Knows pixels; knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from kontextd_models.errors import ImageLoadError, InputError, InvalidValue
from kontextd_models.image_formats import HEAD_BYTES, identify
from kontextd_models.intake import Intake, IntakeLimits, open_image
from kontextd_models.limits import ModelLimits
from kontextd_models.records import LoraWeight, ResolutionMode
from kontextd_models.resolution import plan

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class LoraSet:
    """LoRAs that are merged together; none of them is the base model."""

    loras: tuple[LoraWeight, ...] = ()

    @property
    def name(self) -> str:
        return " + ".join(f"{_stem(lora)}:{lora.scale:g}" for lora in self.loras) or "no LoRA"


@dataclass(frozen=True)
class Photo:
    name: str
    picture: Intake


@dataclass(frozen=True)
class Case:
    """One edit. `image` has the very size of its output, so that nothing is left for the engine to choose."""

    photo: str
    image: Image.Image
    prompt: str
    loras: LoraSet

    @property
    def size(self) -> Size:
        return self.image.size

    @property
    def name(self) -> str:
        return f"{self.photo}, {self.prompt!r}, {self.loras.name}"


def photos(paths: Sequence[Path], limits: ModelLimits) -> list[Photo]:
    """The photos of files and, in the order of their names, those in folders, where files of other kinds are passed by.

    Raises `ImageLoadError` for a folder without photos, and what `open_image` raises, with the file's path.
    """
    found = [_opened(file, IntakeLimits.for_model(limits)) for file in _files(paths)]
    names = [photo.name for photo in found]
    return [
        photo if names.count(photo.name) == 1 else Photo(f"{photo.name} {number}", photo.picture)
        for number, photo in enumerate(found, 1)
    ]


def cases(
    photos: Sequence[Photo],
    prompts: Sequence[str],
    lora_sets: Sequence[LoraSet],
    limits: ModelLimits,
    sizes: Sequence[Size] = (),
) -> list[Case]:
    """Every combination, ordered by set of LoRAs and then by size, so that both change as seldom as can be.

    A photo takes the nearest of the model's preferred sizes. With `sizes` it is taken at each of them, its middle cut
    to their aspect. Raises `InvalidValue` for a size that the model does not make as it is.
    """
    for size in sizes:
        _check_size(size, limits)
    sized = [(photo.name, image) for photo in photos for image in _at_sizes(photo, sizes, limits)]
    order = list(dict.fromkeys(image.size for _, image in sized))
    by_size = sorted(sized, key=lambda named: order.index(named[1].size))
    return [Case(name, image, prompt, loras) for loras in lora_sets for name, image in by_size for prompt in prompts]


def thinned(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases at most, as many of each set of LoRAs, evenly over photos and prompts."""
    names = list(dict.fromkeys(case.loras.name for case in cases))
    kept: list[Case] = []
    for name in names:
        of_set = [case for case in cases if case.loras.name == name]
        wanted = min(len(of_set), count // len(names))
        kept += [of_set[turn * len(of_set) // wanted] for turn in range(wanted)]
    return kept


def _opened(file: Path, limits: IntakeLimits) -> Photo:
    try:
        return Photo(file.stem, open_image(file, limits))
    except InputError as error:
        told = str(error)
        raise type(error)(told if told.startswith(str(file)) else f"{file}: {told}", field=error.field) from error


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if _is_photo(file)) if path.is_dir() else [path]
        if not inside:
            raise ImageLoadError(f"{path} holds no photo; name a file, or a folder with JPEG, PNG or WebP files.")
        found += inside
    return found


def _is_photo(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    try:
        identify(head)
    except InputError:
        return False
    return True


def _at_sizes(photo: Photo, sizes: Sequence[Size], limits: ModelLimits) -> list[Image.Image]:
    if sizes:
        return [ImageOps.fit(photo.picture.image, size, Image.Resampling.LANCZOS) for size in sizes]
    chosen = plan(ResolutionMode.AUTO, photo.picture.width, photo.picture.height, limits)
    return [photo.picture.image.resize((chosen.width, chosen.height), Image.Resampling.LANCZOS)]


def _check_size(size: Size, limits: ModelLimits) -> None:
    made = plan(ResolutionMode.MATCH_INPUT, *size, limits)
    if (made.width, made.height) != size:
        raise InvalidValue(
            f"sizes holds {size[0]}x{size[1]}, which the model makes as {made.width}x{made.height}; give that, or "
            f"sides in multiples of {limits.grid} between {limits.min_area} and {limits.max_area} pixels.",
            field="sizes",
        )


def _stem(lora: LoraWeight) -> str:
    return Path(lora.name or lora.path.name).name.removesuffix(".safetensors")
