"""Adapters into the weights of a loaded model, and out again to the bit. Knows parameters and devices; knows no files.

    W = round(W_base + Σ scale_i · ΔW_i)

Summed in float32 and rounded once, always from the pristine weight: no history of merges leaves a trace, and without
adapters W is W_base. The summands are sorted by the adapter's key and scale, so that their order in a request does not
show in a single bit. Weights are written in place, so that compiled graphs stay valid, and only those whose summands
are not the ones that were merged last.

What is merged into a weight is recorded after it was written, and forgotten before: whatever breaks a merge off, an
interrupt too, the next one knows which weights it has to write again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from kontextd_kernels.lora_merge import merged as merge_low_rank
from torch import Tensor

from kontextd_models import memory
from kontextd_models.cache import content_key
from kontextd_models.encode import Pipeline
from kontextd_models.execution import fp8
from kontextd_models.lora.adapter import Adapter, Delta, LowRank
from kontextd_models.lora.forms import delta, factors
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merged_sets import MergedSets
from kontextd_models.lora.pristine import (
    Masters,
    Place,
    Pristine,
    Room,
    choose,
    keep_pristine,
    parameters_of,
    size_of,
)
from kontextd_models.records import MemoryMode

log = logging.getLogger(__name__)

Scaled: TypeAlias = tuple[Adapter, float]
# By (key of the adapter, scale), sorted: all that the merged weight depends on.
_Summands: TypeAlias = tuple[tuple[str, float], ...]
_ScaledDelta: TypeAlias = tuple[Delta, float]


@dataclass(frozen=True)
class MergeReport:
    """How many weights were written; of these, how many to be the base's again."""

    written: int
    restored: int


@dataclass
class _Sum:
    """What one weight is to become."""

    summands: _Summands = ()
    deltas: list[_ScaledDelta] = field(default_factory=list)

    def add(self, adapter: Adapter, scale: float, deltas: Sequence[Delta]) -> None:
        self.summands += ((adapter.key, scale),)
        self.deltas += [(delta, scale) for delta in deltas]


class Merger:
    """The one writer of a pipeline's weights: what they hold is known here and nowhere else."""

    def __init__(
        self,
        pipeline: Pipeline,
        pristine: Pristine,
        device: torch.device,
        mode: MemoryMode = MemoryMode.RESIDENT,
        spare_device_bytes: int = 0,
    ) -> None:
        self.spare_device_bytes = spare_device_bytes  # beside the model, edits and pristine weights
        self._pipeline, self._pristine, self._device = pipeline, pristine, device
        self._streams = mode is not MemoryMode.RESIDENT
        self._parameters, self._scales = parameters_of(pipeline), fp8.scales_of(pipeline)
        # Without an entry a weight is the base's. None: it may hold anything.
        self._merged: dict[Parameter, _Summands | None] = {}

    @property
    def is_base(self) -> bool:
        """Every weight is known to be the base's."""
        return not self._merged

    def merge(self, wanted: Sequence[Scaled], sets: MergedSets | None = None) -> MergeReport:
        """Make the weights those of the base with all of `wanted`; the same adapter may be there more than once.

        A set that is in `sets` is copied from there, and one that is not is kept there once it is whole.
        After an exception some weights are written and others are not; the next call sets all of them right.
        """
        sums = _by_parameter(wanted)
        stale = [
            parameter
            for parameter in self._parameters
            if self._merged.get(parameter, ()) != (sums[parameter].summands if parameter in sums else ())
        ]
        if stale and self._streams:
            memory.rest(self._pipeline)  # so that what is written is what the next forward pass streams
        key = content_key(*(f"{adapter.key} {scale!r}" for adapter, scale in _sorted(wanted)))
        known = sets.get(key) if sets is not None and stale else {}
        with torch.no_grad(), _exact_products():
            for parameter in stale:
                self._write(parameter, sums.get(parameter, _Sum()), known)
            if sets is not None and stale and sums and not known:
                sets.keep(key, {at: live for parameter in sums for at, live in self._live(parameter).items()})
        return MergeReport(len(stale), sum(parameter not in sums for parameter in stale))

    def key(self, *components: Component) -> str:
        """Equal for equal weights of these components, whatever is merged into the others."""
        distinct = {summands or () for at, summands in self._merged.items() if at.component in components}
        return content_key(*(repr(summands) for summands in sorted(distinct)))

    def _write(self, parameter: Parameter, wanted: _Sum, known: Mapping[Parameter, Tensor]) -> None:
        """`known`: what was written when the same set was merged before."""
        base = self._pristine.weight(parameter)
        self._merged[parameter] = None
        if wanted.deltas and parameter in known:
            for at, live in self._live(parameter).items():
                live.copy_(known[at])
        elif wanted.deltas or parameter in self._scales:
            self._write_sum(parameter, base, wanted.deltas)
        else:
            self._parameters[parameter].copy_(base)
        if wanted.deltas:
            self._merged[parameter] = wanted.summands
        else:
            del self._merged[parameter]

    def _live(self, parameter: Parameter) -> dict[Parameter, Tensor]:
        """What makes up one weight: itself, and its scales where it is in float8."""
        live: dict[Parameter, Tensor] = {parameter: self._parameters[parameter]}
        if parameter in self._scales:
            live[parameter._replace(name=f"{parameter.name}_scale")] = self._scales[parameter]
        return live

    def _write_sum(self, parameter: Parameter, base: Tensor, deltas: Sequence[_ScaledDelta]) -> None:
        target, scale = self._parameters[parameter], self._scales.get(parameter)
        base = base.to(self._device, non_blocking=True)
        up, down = _joined(deltas, base)
        others = [(one, strength) for one, strength in deltas if not _is_plain(one)]
        if scale is not None:
            if others:
                fp8.write(_summed(base, up, down, others), target, scale)
            else:
                fp8.write_sum(base, up, down, target, scale)
        elif others:
            target.copy_(_summed(base, up, down, others))
        elif target.device == base.device:
            merge_low_rank(base, up, down, out=target)
        else:  # it rests in host memory
            target.copy_(merge_low_rank(base, up, down))


def open_merger(
    pipeline: Pipeline, folder: Path, device: torch.device, mode: MemoryMode, masters: Masters | None = None
) -> Merger:
    """The merger of a pipeline that was just loaded from `folder` and placed: its pristine weights go where room is.

    `masters`: what keeps them already, where some of the weights have become float8.
    """
    room = Room.beside_model(device)
    if masters is None:
        size = size_of(parameters_of(pipeline))
        place, reason = choose(size, room, device.type == "cuda")
        log.info("pristine weights (%.1f GB) for LoRAs: %s, %s", size / 1e9, place.value, reason)
        masters = Masters(keep_pristine(pipeline, folder, place, device), place, size)
    spare = room.device - (masters.still_to_copy if masters.place is Place.DEVICE else 0)
    return Merger(pipeline, masters.pristine, device, mode, spare)


def _by_parameter(wanted: Sequence[Scaled]) -> dict[Parameter, _Sum]:
    sums: dict[Parameter, _Sum] = {}
    for adapter, scale in _sorted(wanted):
        for parameter, deltas in adapter.deltas.items():
            sums.setdefault(parameter, _Sum()).add(adapter, scale, deltas)
    return sums


def _sorted(wanted: Sequence[Scaled]) -> list[Scaled]:
    """In the order they are summed in. Scale 0 is absence."""
    return sorted((scaled for scaled in wanted if scaled[1]), key=lambda scaled: (scaled[0].key, scaled[1]))


def _is_plain(one: Delta) -> bool:
    return isinstance(one.form, LowRank) and one.magnitude is None


def _joined(deltas: Sequence[_ScaledDelta], base: Tensor) -> tuple[Tensor, Tensor]:
    """All plain low-rank deltas as one product, [out, R] and [R, in]: with scales in the first, which is float32."""
    ups, downs = [], []
    for one, scale in deltas:
        if _is_plain(one) and isinstance(one.form, LowRank):
            up, down = factors(one.form, scale, base.device)
            below = base.shape[0] - one.at - up.shape[0]
            ups.append(torch.nn.functional.pad(up, (0, 0, one.at, below)) if one.at or below else up)
            downs.append(down)
    if len(ups) == 1:
        return ups[0], downs[0]
    if ups:
        return torch.cat(ups, dim=1), torch.cat(downs)
    return base.new_empty(base.shape[0], 0, dtype=torch.float32), base.new_empty(
        0, *base.shape[1:], dtype=torch.float32
    )


def _summed(base: Tensor, up: Tensor, down: Tensor, others: Sequence[_ScaledDelta]) -> Tensor:
    """In float32. Each delta is made from the pristine rows, never from what the ones before it left."""
    total = base.to(torch.float32, copy=True)
    if up.shape[1]:
        total.addmm_(up, down.float())
    for one, scale in others:
        rows = slice(one.at, one.at + one.stop - one.start)
        total[rows].add_(delta(one, base[rows]), alpha=scale)
    return total


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever the process allows them otherwise: TF32 keeps ten bits of a factor."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # made at import
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
