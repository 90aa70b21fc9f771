"""What messages call a LoRA of a request. Knows names; knows no torch and no files."""

from __future__ import annotations

from kontextd_models.lora.coverage import Coverage
from kontextd_models.records import LoraWeight

_NAMES_SHOWN = 3
_NAME_LENGTH = 100  # names come from clients and from files


def name_of(lora: LoraWeight) -> str:
    """What messages and reports call it."""
    return lora.name or lora.path.name


def label(index: int, lora: LoraWeight) -> str:
    """How a message about it begins."""
    return f"loras[{index}] ({_clipped(name_of(lora))})"


def partly_covered(index: int, lora: LoraWeight, coverage: Coverage) -> str:
    """The warning that some of its tensors were left out, with the first of their names."""
    shown = ", ".join(_clipped(name) for name in coverage.unmatched[:_NAMES_SHOWN])
    more = len(coverage.unmatched) - _NAMES_SHOWN
    return (
        f"{label(index, lora)}: {coverage.total - coverage.matched} of its {coverage.total} tensors have no place in "
        f"this model and were left out: {shown}{f' and {more} more' if more > 0 else ''}."
    )


def _clipped(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…"
