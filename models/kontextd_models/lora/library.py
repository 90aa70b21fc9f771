"""LoRA files that were read, kept for the next request. Knows paths and byte budgets; knows no dialects, no merging.

A file that is what it was when it was read (size, times, inode) is not opened again; one that changed under its name
is. Adapters are kept by the SHA-256 of their file, so a file under two paths is there once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kontextd_models.cache import ByteLRU
from kontextd_models.errors import LoraFileError
from kontextd_models.lora.adapter import Adapter, Delta, Form, Full, LoHa, LoKr, LowRank, Replaced
from kontextd_models.lora.layout import Layout
from kontextd_models.lora.reading import read_adapter
from kontextd_models.records import LoraLimits
from kontextd_models.weight_files import clipped

_MAX_PATHS = 10_000  # whose files are remembered, a few hundred bytes each
_State = tuple[int, ...]
_Move = Callable[[Tensor], Tensor]


class Library:
    """Adapters by path, in host memory; on a GPU also on the device, as far as `device_budget_bytes` goes."""

    def __init__(
        self, layout: Layout, limits: LoraLimits, budget_bytes: int, device: torch.device, device_budget_bytes: int = 0
    ) -> None:
        self._layout, self._limits, self._device = layout, limits, device
        self._adapters = ByteLRU[Adapter](budget_bytes)
        self._on_device = ByteLRU[Adapter](device_budget_bytes)
        self._keys: dict[Path, tuple[_State, str]] = {}

    def read(self, path: Path, name: str = "", sha256: str = "") -> tuple[Adapter, bool]:
        """The adapter in host memory, pinned if there is a GPU to copy it to; True where it had been read before.

        `sha256`: the file's, where it is known. Raises `LoraError`.
        """
        known_by_content = self._adapters.get(sha256) if sha256 else None
        if known_by_content is not None:
            return known_by_content, True
        try:
            path = path.resolve()
            state = _state(path)
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in the path
            cause = (error.strerror if isinstance(error, OSError) else None) or "its path leads nowhere"
            called = clipped(name or path.name)
            raise LoraFileError(f"{called} cannot be read: {cause}. Give a file that is there.") from error
        known, key = self._keys.get(path, ((), ""))
        adapter = self._adapters.get(key) if known == state else None
        if adapter is not None:
            return adapter, True
        adapter = self._shared(read_adapter(path, self._layout, self._limits, name))
        self._remember(path, state, adapter.key)
        return adapter, False

    def on_device(self, adapters: Sequence[Adapter]) -> list[Adapter]:
        """The adapters where they are merged: there to stay as far as the budget goes for all of these together.

        The others are as they were, and are copied to the device piece by piece.
        """
        left, placed = self._on_device.budget_bytes, []
        for adapter in adapters:
            fits = self._device.type != "cpu" and adapter.size_bytes <= left
            left -= adapter.size_bytes if fits else 0
            placed.append(self._kept_on_device(adapter) if fits else adapter)
        return placed

    def release_device(self) -> None:
        """Forget what is on the device."""
        self._on_device.clear()

    def _kept_on_device(self, adapter: Adapter) -> Adapter:
        found = self._on_device.get(adapter.key)
        if found is None:
            found = moved(adapter, lambda tensor: tensor.to(self._device, non_blocking=True))
            self._on_device.put(adapter.key, found)
        return found

    def _shared(self, adapter: Adapter) -> Adapter:
        """The one of that key that is kept already, or this one, which is kept from now on."""
        kept = self._adapters.get(adapter.key)
        if kept is None:
            kept = moved(adapter, Tensor.pin_memory) if self._device.type == "cuda" else adapter
            self._adapters.put(adapter.key, kept)
        return kept

    def _remember(self, path: Path, state: _State, key: str) -> None:
        """Not where the file changed while it was read: then the next request has to look again."""
        self._keys.pop(path, None)
        if _state_or_none(path) == state:
            self._keys[path] = (state, key)
        if len(self._keys) > _MAX_PATHS:
            del self._keys[next(iter(self._keys))]


def moved(adapter: Adapter, move: _Move) -> Adapter:
    """The same adapter with each tensor moved, once even if several deltas share it."""
    done: dict[tuple[object, ...], Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if same not in done:
            done[same] = move(tensor)
        return done[same]

    deltas = {at: tuple(map(partial(_moved_delta, move=once), all_)) for at, all_ in adapter.deltas.items()}
    return replace(adapter, deltas=deltas)


def _moved_delta(delta: Delta, move: _Move) -> Delta:
    magnitude = None if delta.magnitude is None else move(delta.magnitude)
    return replace(delta, form=_moved_form(delta.form, move), magnitude=magnitude)


def _moved_form(form: Form, move: _Move) -> Form:
    match form:
        case LowRank(up, down):
            return replace(form, up=move(up), down=move(down))
        case LoKr(w1, w2):
            return replace(form, w1=_moved_factor(w1, move), w2=_moved_factor(w2, move))
        case LoHa(w1, w2):
            return replace(form, w1=(move(w1[0]), move(w1[1])), w2=(move(w2[0]), move(w2[1])))
        case Full(diff):
            return replace(form, diff=move(diff))
        case Replaced(value):
            return replace(form, value=move(value))


def _moved_factor(factor: Tensor | tuple[Tensor, Tensor], move: _Move) -> Tensor | tuple[Tensor, Tensor]:
    return move(factor) if isinstance(factor, Tensor) else (move(factor[0]), move(factor[1]))


def _state(path: Path) -> _State:
    """Changes with the file. The time of its inode cannot be set back as the other one can, by `cp -p` for one."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _state_or_none(path: Path) -> _State | None:
    try:
        return _state(path)
    except OSError:
        return None
