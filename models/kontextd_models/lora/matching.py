"""Which tensors of a checked file the model has a place for. Knows names and shapes; reads no tensors."""

from __future__ import annotations

from kontextd_models.errors import LoraError, LoraFileError, LoraMismatch
from kontextd_models.lora.architectures import looks_like
from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.dialects import normalise, unsupported_form
from kontextd_models.lora.entry import Normalised
from kontextd_models.lora.file_checks import CheckedFile
from kontextd_models.lora.layout import Layout


def match(file: CheckedFile, layout: Layout) -> tuple[Normalised, Coverage]:
    """The file in the model's terms, and how much of it that is; `nothing_matches` is why it is nothing."""
    normalised = normalise(file.tensors, file.metadata, layout)
    total = len(file.tensors)
    unmatched = tuple(sorted(normalised.unmatched))
    return normalised, Coverage(normalised.dialects, total - len(unmatched), total, unmatched)


def architecture_of(file: CheckedFile) -> str:
    """What a file looks like that matches nothing."""
    return looks_like(file.tensors.keys(), {name: info.shape for name, info in file.tensors.items()})


def nothing_matches(file: CheckedFile) -> LoraError:
    """Why a file is of no use to this model: a form that is not read, or another architecture."""
    form = unsupported_form(file.tensors.keys())
    if form is not None:
        return LoraFileError(f"{file.name}: {form} cannot be merged. Convert it to a plain LoRA.")
    return LoraMismatch(
        f"{file.name} matches nothing of this model, {min(file.tensors)} for one of its {len(file.tensors)} tensors. "
        f"It looks like {architecture_of(file)}. Use a LoRA for FLUX.1."
    )
