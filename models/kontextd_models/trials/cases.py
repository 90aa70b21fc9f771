"""What rows are compared on: photos × prompts × sets of LoRAs, at exact sizes. Knows pixels; knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
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
    """LoRAs that are merged together; none of them is the base model. `label` tells it from other sets."""

    loras: tuple[LoraWeight, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or _set_name([_end(lora, 1) for lora in self.loras], self.loras)


@dataclass(frozen=True)
class Photo:
    name: str
    picture: Intake


@dataclass(frozen=True, eq=False)
class Case:
    """One edit, equal to itself alone. `image` has the size of its output: nothing is left for the engine to choose."""

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
    names = _numbered([photo.name for photo in found])
    return [Photo(name, photo.picture) for name, photo in zip(names, found, strict=True)]


def cases(
    photos: Sequence[Photo],
    prompts: Sequence[str],
    lora_sets: Sequence[LoraSet],
    limits: ModelLimits,
    sizes: Sequence[Size] = (),
) -> list[Case]:
    """Every combination, ordered by set of LoRAs and then by size, so that both change as seldom as can be.

    A set that comes again is left out, and each has a name of its own. A photo takes the nearest of the model's
    preferred sizes. With `sizes` it is taken at each of them, its middle cut to their aspect. Raises `InvalidValue` for
    a size that the model does not make as it is.
    """
    for size in sizes:
        _check_size(size, limits)
    sized = [(photo.name, image) for photo in photos for image in _at_sizes(photo, sizes, limits)]
    order = list(dict.fromkeys(image.size for _, image in sized))
    by_size = sorted(sized, key=lambda named: order.index(named[1].size))
    sets = _told_apart(lora_sets)
    return [Case(name, image, prompt, loras) for loras in sets for name, image in by_size for prompt in prompts]


def thinned(cases: Sequence[Case], at_most: int) -> list[Case]:
    """`at_most` of the cases, as many of each set of LoRAs, evenly over photos and prompts."""
    sets = list(dict.fromkeys(case.loras for case in cases))
    kept: list[Case] = []
    for loras in sets:
        of_set = [case for case in cases if case.loras == loras]
        wanted = min(len(of_set), at_most // len(sets))
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


def _told_apart(lora_sets: Sequence[LoraSet]) -> list[LoraSet]:
    """Each set once, under a name of its own."""
    once: dict[tuple[tuple[Path, float], ...], LoraSet] = {}
    for one in lora_sets:
        once.setdefault(tuple((lora.path, lora.scale) for lora in one.loras), one)
    sets = list(once.values())
    names = _lora_names([lora for one in sets for lora in one.loras])
    labels = _numbered([_set_name([names[lora.path] for lora in one.loras], one.loras) for one in sets])
    return [replace(one, label=label) for one, label in zip(sets, labels, strict=True)]


def _lora_names(loras: Sequence[LoraWeight]) -> dict[Path, str]:
    """By file: the shortest end of its path, as it was typed, that no other one ends in; else all that was typed."""
    files = {lora.path: lora for lora in loras}
    deepest = max((len(Path(_typed(lora)).parts) for lora in files.values()), default=0)
    names = {path: _typed(lora) for path, lora in files.items()}
    for depth in range(deepest, 0, -1):
        ends = {path: _end(lora, depth) for path, lora in files.items()}
        told = list(ends.values())
        names |= {path: end for path, end in ends.items() if told.count(end) == 1}
    return names


def _set_name(names: Sequence[str], loras: Sequence[LoraWeight]) -> str:
    return " + ".join(f"{name}:{_scale(lora)}" for name, lora in zip(names, loras, strict=True)) or "no LoRA"


def _scale(lora: LoraWeight) -> str:
    short = f"{lora.scale:g}"
    return short if float(short) == lora.scale else str(lora.scale)


def _end(lora: LoraWeight, depth: int) -> str:
    """The last parts of its path, without the ending of its name."""
    return str(Path(*Path(_typed(lora).removesuffix(".safetensors")).parts[-depth:]))


def _typed(lora: LoraWeight) -> str:
    return lora.name or str(lora.path)


def _numbered(names: Sequence[str]) -> list[str]:
    """Those that come several times with the next number that makes them a name that is free."""
    taken, found = set(names), list[str]()
    for name in names:
        told = name
        if names.count(name) > 1:
            told = next(one for number in count(1) if (one := f"{name} {number}") not in taken)
        taken.add(told)
        found.append(told)
    return found
