"""The LoRAs of one request: all read and checked, then merged, then told of. Knows requests' LoRAs; knows no images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kontextd_models.errors import LoraError
from kontextd_models.loading import LoadedModel
from kontextd_models.lora.adapter import Adapter
from kontextd_models.lora.layout import Component, layout_of
from kontextd_models.lora.library import Library
from kontextd_models.lora.merged_sets import MergedSets
from kontextd_models.lora.wording import label, name_of, partly_covered
from kontextd_models.records import EngineConfig, LoraReport, LoraWeight

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stacked:
    """`is_hit`: the same set was merged already."""

    reports: tuple[LoraReport, ...] = ()
    warnings: tuple[str, ...] = ()
    is_hit: bool = True


class LoraStack:
    """The files an engine has read, and its model's weights. What these hold is known to the model's merger."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self._merger = model.merger
        spare = self._merger.spare_device_bytes
        on_device = min(config.lora_device_cache_bytes, spare)
        self._library = Library(
            layout_of(model.pipeline), config.lora_limits, config.lora_cache_bytes, model.device, on_device
        )
        kept = config.lora_merged_cache_bytes
        self._sets = MergedSets(min(kept, spare - on_device) if model.device.type == "cuda" else kept)

    @property
    def is_base(self) -> bool:
        """Nothing is merged."""
        return self._merger.is_base

    def merge(self, loras: Sequence[LoraWeight]) -> Stacked:
        """Make the model's weights those of the base with `loras`.

        Raises `LoraError` that names the LoRA at fault, before any weight is touched.
        """
        read = [self._read(index, lora) for index, lora in enumerate(loras)]
        rows = [(lora, adapter, cached) for lora, (adapter, cached) in zip(loras, read, strict=True)]
        placed = self._library.on_device([adapter for _, adapter, _ in rows])
        scaled = [(adapter, lora.scale) for adapter, lora in zip(placed, loras, strict=True)]
        done = self._merger.merge(scaled, self._sets)
        log.info("%d LoRAs: %d weights written, %d of them the base's again", len(rows), done.written, done.restored)
        return Stacked(
            tuple(_report(*row) for row in rows),
            tuple(
                partly_covered(index, lora, adapter.coverage)
                for index, (lora, adapter, _) in enumerate(rows)
                if not adapter.coverage.is_whole
            ),
            is_hit=not done.written,
        )

    def encoders_key(self) -> str:
        """Equal for equal weights of the two text encoders."""
        return self._merger.key(Component.CLIP, Component.T5)

    def release_device(self) -> None:
        """Give back what is on the device only to save time."""
        self._library.release_device()
        self._sets.clear()

    def _read(self, index: int, lora: LoraWeight) -> tuple[Adapter, bool]:
        name = name_of(lora)
        try:
            return self._library.read(lora.path, name, lora.sha256)
        except LoraError as error:
            said = str(error).removeprefix(f"{name}: ")
            raise type(error)(f"{label(index, lora)}: {said}", index=index) from error


def _report(lora: LoraWeight, adapter: Adapter, was_cached: bool) -> LoraReport:
    found = adapter.coverage
    return LoraReport(
        name_of(lora), adapter.key, lora.scale, found.dialects, found.matched, found.total, found.unmatched, was_cached
    )
