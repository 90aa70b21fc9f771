"""What the header of a file says about alphas. Knows peft's configuration as diffusers writes it; knows no tensors.

diffusers puts it as JSON under `lora_adapter_metadata`, with a component before each name (`transformer.lora_alpha`)
or, saved from a component, without one. Ranks are not read from it: those of the matrices are the ones that count.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from kontextd_models.errors import LoraFileError
from kontextd_models.lora.layout import Component

_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_REMEDY = "Save the LoRA anew, or remove that entry from the file's metadata."
_DOTTED_NAME = re.compile(r"\^?[\w.-]+\Z")
# Initialisations of peft that subtract from the base weights: their matrices mean nothing to the pristine ones.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """Alphas of one component. `by_name` has those of single modules, by peft's alpha_pattern."""

    alpha: float | None = None
    by_name: Mapping[str, float] | None = None
    rank_stabilised: bool = False

    def alpha_of(self, name: str) -> float | None:
        """peft lets a pattern match the end of a module's name, from a dot on. Patterns are names here, not code.

        A regular expression out of a stranger's file could run for years.
        """
        for pattern, alpha in (self.by_name or {}).items():
            if name == pattern.removeprefix("^") or (pattern[0] != "^" and name.endswith("." + pattern)):
                return alpha
        return self.alpha


def configs(metadata: Mapping[str, str]) -> dict[Component, AdapterConfig]:
    """What is said of each component. Raises `LoraFileError` where it makes no sense: the scale would be a guess."""
    text = metadata.get(_KEY)
    if text is None:
        return {component: AdapterConfig() for component in Component}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"the metadata {_KEY} is not JSON. {_REMEDY}") from error
    if not isinstance(said, dict):
        raise LoraFileError(f"the metadata {_KEY} is no object. {_REMEDY}")
    return {component: _config(_of_component(said, component)) for component in Component}


def _of_component(said: Mapping[str, object], component: Component) -> Mapping[str, object]:
    """What stands under the component's name; where no name stands before anything, all of it."""
    prefixes = tuple(f"{component.value}." for component in Component)
    if not any(key.startswith(prefixes) for key in said):
        return said
    start = f"{component.value}."
    return {key.removeprefix(start): value for key, value in said.items() if key.startswith(start)}


def _config(said: Mapping[str, object]) -> AdapterConfig:
    _check_start(said.get("init_lora_weights"))
    alpha = said.get("lora_alpha", said.get("alpha"))  # peft's LoRA and peft's LoKr and LoHa
    patterns = said.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoraFileError(f"the metadata alpha_pattern is no object. {_REMEDY}")
    by_name = {_pattern(name): _number("alpha_pattern", value) for name, value in patterns.items()}
    rank_stabilised = said.get("use_rslora", False)
    if not isinstance(rank_stabilised, bool):
        raise LoraFileError(f"the metadata use_rslora is neither true nor false. {_REMEDY}")
    return AdapterConfig(None if alpha is None else _number("lora_alpha", alpha), by_name, rank_stabilised)


def _check_start(init_lora_weights: object) -> None:
    for start in _CHANGES_THE_BASE:
        if isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(start):
            raise LoraFileError(
                f"the LoRA was initialised by {start}, which changes the base weights that it is for. Convert it to a "
                "plain LoRA with peft's path_initial_model_for_weight_conversion."
            )


def _pattern(name: str) -> str:
    if not _DOTTED_NAME.match(name):
        raise LoraFileError(
            "the metadata alpha_pattern has a regular expression; only names of modules are read. "
            "Save the LoRA with the alphas in its tensors."
        )
    return name


def _number(called: str, value: object) -> float:
    # JSON may hold NaN, infinities and integers too large for a float; what else is too much, the factor's check says.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise LoraFileError(f"the metadata {called} holds what is no finite number. {_REMEDY}")
    return float(value)
