"""The weights as they were loaded, wherever there is room for them. Knows a model's parameters; knows no LoRAs.

| place | what is there | taken where |
|---|---|---|
| `device` | copies on the GPU | beside all of them an eighth of the GPU's memory stays free |
| `host` | copies in pinned host memory | beside all of them a quarter as much stays free there |
| `files` | the model's own files, mapped: page cache, and no memory of the process | otherwise, and always on the CPU |

Copies are made one by one, of a weight that is about to be written for the first time; a model that never meets a LoRA
needs none. What the files hold is compared with the model at that moment, bit by bit, so a file that was exchanged, or
a name that is not known here, costs a copy and never a wrong weight. The files must not be written into while they are
mapped; replace them by renaming.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kontextd_models.doctor import available_memory
from kontextd_models.encode import Pipeline
from kontextd_models.folder import PARTS
from kontextd_models.lora.layout import Component, Parameter

log = logging.getLogger(__name__)

Parameters = Mapping[Parameter, nn.Parameter]
_HOST = torch.device("cpu")
_ARENA_BYTES = 256 * 2**20  # a power of two, to which torch rounds pinned memory up; holds FLUX.1's largest weight
_ALIGNMENT = 256  # what torch's allocators give too, and wide copies want
_SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Place(StrEnum):
    """Where pristine weights lie."""

    DEVICE = "device"
    HOST = "host"
    FILES = "files"


@dataclass(frozen=True)
class Room:
    """Bytes to spare once the model is loaded, those that edits need not counted. `device` is 0 on the CPU."""

    device: int
    host: int

    @classmethod
    def beside_model(cls, device: torch.device, planned_bytes: int = 0) -> Room:
        """`planned_bytes`: what is not on the device yet, and will be."""
        on_device = 0
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            on_device = max(0, free - planned_bytes - total // 8)
        return cls(on_device, (available_memory() or 0) * 4 // 5)


class Pristine(Protocol):
    """Asked for a weight before that is written for the first time, it gives the same bits ever after."""

    def weight(self, parameter: Parameter) -> Tensor:
        """In the model's dtype, where it lies. Not to be written."""


@dataclass(frozen=True)
class Masters:
    """Pristine weights that are kept since before the model's own became something else.

    `still_to_copy` are the bytes of those that will be copied to the same place as they are asked for.
    """

    pristine: Pristine
    place: Place
    still_to_copy: int


def parameters_of(pipeline: Pipeline) -> dict[Parameter, nn.Parameter]:
    """Every parameter of the three components, in the order of the model."""
    return {
        Parameter(component, name): value
        for component in Component
        for name, value in getattr(pipeline, component.value).named_parameters()
    }


def choose(size_bytes: int, room: Room, is_cuda: bool) -> tuple[Place, str]:
    """The place, and one sentence that says why."""
    if not is_cuda:
        return Place.FILES, "on the CPU they take no memory there"
    spare = f"{_gb(room.device)} to spare on the device and {_gb(room.host)} in host memory"
    if size_bytes <= room.device:
        return Place.DEVICE, f"there are {spare}"
    return (Place.HOST if size_bytes <= room.host else Place.FILES), f"there are only {spare}"


def keep_pristine(pipeline: Pipeline, folder: Path, place: Place, device: torch.device) -> Pristine:
    """What keeps the weights of a pipeline that was loaded from `folder` and has had nothing merged yet."""
    parameters = parameters_of(pipeline)
    if place is Place.FILES:
        return MappedFiles(parameters, _mapped(pipeline, folder), is_pinned=device.type == "cuda")
    on_device = place is Place.DEVICE
    return Copies(parameters, device if on_device else _HOST, is_pinned=not on_device and device.type == "cuda")


def size_of(parameters: Parameters) -> int:
    return sum(value.numel() * value.element_size() for value in parameters.values())


class Copies:
    """Copies on a device; those in host memory may be pinned, for a GPU to read them without a detour."""

    def __init__(self, parameters: Parameters, device: torch.device, *, is_pinned: bool = False) -> None:
        self._parameters, self._device, self._is_pinned = parameters, device, is_pinned
        self._copies: dict[Parameter, Tensor] = {}
        self._arena = _PinnedArena()

    def weight(self, parameter: Parameter) -> Tensor:
        copy = self._copies.get(parameter)
        if copy is None:
            value = self._parameters[parameter].detach()
            copy = self._copies[parameter] = self._room_for(value).copy_(value)
        return copy

    def __contains__(self, parameter: Parameter) -> bool:
        return parameter in self._copies

    def _room_for(self, value: Tensor) -> Tensor:
        return self._arena.take(value) if self._is_pinned else torch.empty_like(value, device=self._device)


class MappedFiles:
    """Tensors of the model's files; a copy where they turn out not to be what was loaded."""

    def __init__(self, parameters: Parameters, mapped: Mapping[Parameter, Tensor], *, is_pinned: bool = False) -> None:
        self._parameters, self._mapped = parameters, mapped
        self._dtypes = {at: value.dtype for at, value in parameters.items()}  # as loaded: what is live may be float8
        self._proved: set[Parameter] = set()
        self._copies = Copies(parameters, _HOST, is_pinned=is_pinned)

    def weight(self, parameter: Parameter) -> Tensor:
        if parameter in self._copies:
            return self._copies.weight(parameter)
        value, found = self._parameters[parameter], self._mapped.get(parameter)
        weight = None if found is None else found.to(self._dtypes[parameter])  # as the loaders convert
        if parameter not in self._proved:
            if weight is None or not _same_bits(weight, value.detach()):
                log.warning("%s is not in the model's files as it was loaded: a copy of it is kept.", parameter.name)
                return self._copies.weight(parameter)
            self._proved.add(parameter)
        assert weight is not None  # only what was found has been proved
        return weight


class _PinnedArena:
    """Pinned host memory in large pieces: torch rounds each up to a power of two, which would waste half of it."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, like: Tensor) -> Tensor:
        """A tensor of the same shape and dtype, whose values are undefined."""
        size = like.numel() * like.element_size()
        if self._used + size > self._piece.numel():
            self._piece = torch.empty(max(size, _ARENA_BYTES), dtype=torch.uint8, pin_memory=True)
            self._used = 0
        taken = self._piece[self._used : self._used + size].view(like.dtype).view(like.shape)
        self._used += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        return taken


def _mapped(pipeline: Pipeline, folder: Path) -> dict[Parameter, Tensor]:
    """Parameters by what the files have under their names."""
    mapped = {}
    for component in Component:
        tensors = _open(folder / component.value)
        aliases: dict[nn.Parameter, list[str]] = {}
        for name, value in getattr(pipeline, component.value).named_parameters(remove_duplicate=False):
            aliases.setdefault(value, []).append(name)  # T5's embedding has two names, and a file one or both of them
        for value, names in aliases.items():
            found = next(filter(None, (_key(tensors, name, value) for name in names)), None)
            if found is not None:
                mapped[Parameter(component, names[0])] = tensors[found]
    return mapped


def _key(tensors: Mapping[str, Tensor], name: str, value: Tensor) -> str | None:
    """The name itself; or the one that ends in it, as CLIP's files of old have `text_model.` before each."""
    keys = [name] if name in tensors else [key for key in tensors if key.endswith(f".{name}")]
    return keys[0] if len(keys) == 1 and tensors[keys[0]].shape == value.shape else None


def _open(folder: Path) -> dict[str, Tensor]:
    """The tensors of one part, mapped: nothing of them is read yet."""
    stem = re.escape(next(part.weights for part in PARTS if part.name == folder.name))
    shards = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in sorted(path for path in folder.glob("*.safetensors") if shards.fullmatch(path.name)):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    return tensors


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    bits = _SAME_BITS[right.element_size()]  # unlike values, these tell −0 from 0, and NaN is one too
    return torch.equal(left.to(right.device).view(bits), right.view(bits))


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
