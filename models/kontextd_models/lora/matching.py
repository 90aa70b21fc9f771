"""Which tensors of a checked file the model has a place for, and whether it can use them. Reads no tensors."""

from __future__ import annotations

from kontextd_models.errors import LoraError, LoraFileError, LoraMismatch
from kontextd_models.lora.architectures import looks_like, other_model
from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.dialects import normalise, unsupported_form
from kontextd_models.lora.entry import Normalised
from kontextd_models.lora.file_checks import CheckedFile
from kontextd_models.lora.layout import Component, Layout
from kontextd_models.lora.shapes import check_entries
from kontextd_models.records import LoraLimits


def match(file: CheckedFile, layout: Layout) -> tuple[Normalised, Coverage]:
    """The file in the model's terms, and how much of it that is. Raises `LoraFileError` where it contradicts itself."""
    try:
        normalised = normalise(file.tensors, file.metadata, layout)
    except LoraFileError as error:
        raise LoraFileError(f"{file.name}: {error}") from error
    total = len(file.tensors)
    unmatched = tuple(sorted(normalised.unmatched))
    return normalised, Coverage(normalised.dialects, total - len(unmatched), total, unmatched)


def check(file: CheckedFile, normalised: Normalised, layout: Layout, limits: LoraLimits) -> None:
    """Raises `LoraError` where nothing matches, where what does is another model's, and where it does not fit."""
    if not normalised.entries:
        raise _nothing_matches(file)
    foreign = foreign_to(file, normalised)
    if foreign:
        matched = len(file.tensors) - len(normalised.unmatched)
        raise LoraMismatch(
            f"{file.name} looks like {foreign}: this model has names like those of {matched} of its "
            f"{len(file.tensors)} tensors, but none like {min(normalised.unmatched)}. Use a LoRA for FLUX.1."
        )
    try:
        check_entries(normalised.entries, file.tensors, layout, limits, file.name)
    except LoraMismatch as error:
        other = other_model(file.tensors.keys(), _shapes(file))
        if other is None:
            raise
        raise LoraMismatch(f"{error} It looks like {other}.") from error


def foreign_to(file: CheckedFile, normalised: Normalised) -> str | None:
    """The model that a file is for of which a part has names like FLUX.1's; None where nothing says so.

    Widths and names are shared all over: the text encoders of SDXL and SD 3 are those of FLUX.1, and Qwen-Image's first
    19 blocks have its attention. Merged in part, such a file would do no more than spoil the picture.
    """
    parameters = {part.parameter for entry in normalised.entries for part in entry.parts}
    is_in_transformer = any(parameter.component is Component.TRANSFORMER for parameter in parameters)
    return other_model(normalised.unmatched, _shapes(file), only_kin=is_in_transformer)


def architecture_of(file: CheckedFile) -> str:
    """What a file looks like that matches nothing."""
    return looks_like(file.tensors.keys(), _shapes(file))


def _shapes(file: CheckedFile) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in file.tensors.items()}


def _nothing_matches(file: CheckedFile) -> LoraError:
    """Why a file is of no use to this model: a form that is not read, or another architecture."""
    form = unsupported_form(file.tensors.keys())
    if form is not None:
        return LoraFileError(f"{file.name}: {form} cannot be merged. Convert it to a plain LoRA.")
    return LoraMismatch(
        f"{file.name} matches nothing of this model, {min(file.tensors)} for one of its {len(file.tensors)} tensors. "
        f"It looks like {architecture_of(file)}. Use a LoRA for FLUX.1."
    )
