"""The parameters a LoRA may change, by component and name. Knows shapes; knows no tensors, no files of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from kontextd_models.encode import Pipeline
    from kontextd_models.folder import ModelFolder

# How files of older libraries, and so those of FLUX.1, name parameters otherwise than `named_parameters()` does:
# transformers 5 dropped CLIP's prefix (conversion_mapping.py), and T5's embedding is one tensor under two names.
_CLIP_PREFIX = "text_model."
_T5_NAMES = {"encoder.embed_tokens.weight": "shared.weight"}


class Component(StrEnum):
    """The parts of a pipeline that LoRAs are made for, by the pipeline's own names."""

    TRANSFORMER = "transformer"
    CLIP = "text_encoder"
    T5 = "text_encoder_2"


class Parameter(NamedTuple):
    """One weight or bias; `name` as in the component's `named_parameters()`."""

    component: Component
    name: str


# The shape of each parameter of a model, [out, in] or [n].
Layout: TypeAlias = Mapping[Parameter, tuple[int, ...]]


def layout_of(pipeline: Pipeline) -> Layout:
    """Every parameter of the three components. A parameter under two names has the first one."""
    return {
        Parameter(component, name): tuple(value.shape)
        for component in Component
        for name, value in getattr(pipeline, component.value).named_parameters()
    }


def layout_of_folder(folder: ModelFolder) -> Layout:
    """The same from the headers of a checked folder, without torch."""
    return {
        Parameter(component, _name(component, key)): info.shape
        for component in Component
        for key, info in folder.tensors[component.value].items()
        if info.is_float  # a whole number is a buffer, such as CLIP's position_ids
    }


def _name(component: Component, key: str) -> str:
    """The name that the library of today has for a tensor of a file."""
    if component is Component.CLIP:
        return key.removeprefix(_CLIP_PREFIX)
    return _T5_NAMES.get(key, key) if component is Component.T5 else key
