"""What the end of a key says its tensor is: a slot of a form. Knows the ends of names; knows no modules.

Sources: peft (`lora_A`, `lora_B`, `lora_magnitude_vector`, with or without the adapter's name), sd-scripts and LyCORIS
(`weight_list` of each of lycoris/modules), diffusers before peft (`lora.down`, `lora_linear_layer.down`), x-flux
(`down`), ai-toolkit (`magnitude`), ComfyUI (comfy/weight_adapter), the reference's control LoRAs (norms whole).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kontextd_models.lora.entry import Kind


class Slot(NamedTuple):
    """A tensor's place: in which form, None for what any form may have, and whether in that of the module's bias.

    Slots that no complete form has, such as the `mid` of Tucker decompositions, keep their matrix from being read
    without them.
    """

    kind: Kind | None
    name: str
    of_bias: bool = False


ALPHA = Slot(None, "alpha")
DORA_SCALE = Slot(None, "dora_scale")
BIAS = Slot(None, "bias")  # of peft's lora_bias: added to what the up matrix gives, and scaled with it

# peft's name of the adapter: `default`, say, in files that were not saved by its own function.
_ADAPTER = r"(?:\.(?!(?:bias|alpha)\Z)[^.]+)?"
_LOKR = ("w1_a", "w1_b", "w1", "w2_a", "w2_b", "w2", "t1", "t2")
_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

_SUFFIXES: tuple[tuple[str, Slot], ...] = (
    (rf"\.lora_B{_ADAPTER}\.bias", BIAS),
    (rf"\.lora_A{_ADAPTER}(?:\.weight)?", Slot(Kind.LOW_RANK, "down")),
    (rf"\.lora_B{_ADAPTER}(?:\.weight)?", Slot(Kind.LOW_RANK, "up")),
    (rf"\.lora_E{_ADAPTER}", Slot(Kind.LOW_RANK, "E")),  # AdaLoRA: up · E · down
    (r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.|\.)down\.weight", Slot(Kind.LOW_RANK, "down")),
    (r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.|\.)up\.weight", Slot(Kind.LOW_RANK, "up")),
    (r"\.lora_mid\.weight", Slot(Kind.LOW_RANK, "mid")),
    *((rf"\.lokr_{name}{_ADAPTER}", Slot(Kind.LOKR, name)) for name in _LOKR),
    *((rf"\.hada_{name}{_ADAPTER}", Slot(Kind.LOHA, name)) for name in _LOHA),
    (r"\.(?:diff|w_norm)", Slot(Kind.FULL, "diff")),
    (r"\.(?:diff_b|b_norm)", Slot(Kind.FULL, "diff", of_bias=True)),
    # Norms that were trained whole: of the reference, of ComfyUI's copy of that, of diffusers (`lora_pipeline.py`,
    # `_control_lora_supported_norm_keys`). Any other `.weight` is that of a checkpoint.
    (r"(?<=_norm)\.scale(?:\.set_weight)?", Slot(Kind.REPLACED, "value")),
    (r"(?:(?<=\.norm_[qk])|(?<=\.norm_added_[qk]))\.weight", Slot(Kind.REPLACED, "value")),
    (r"\.alpha", ALPHA),
    (rf"\.(?:dora_scale|magnitude|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)", DORA_SCALE),
)
# The group that matched is the row.
_ANY = re.compile("(?:" + "|".join(f"({pattern})" for pattern, _ in _SUFFIXES) + r")\Z")
_MOST_DOTS = 3


def parsed(key: str) -> tuple[str, Slot] | None:
    """The key without its suffix, and what that is of. None for a suffix of no supported form."""
    for start in _starts(key):
        found = _ANY.match(key, start)
        if found and found.lastindex is not None:
            return key[:start], _SUFFIXES[found.lastindex - 1][1]
    return None


def _starts(key: str) -> list[int]:
    """Where the suffix may begin, the longest first. Names may be long: nowhere else is looked."""
    starts, end = [key.rfind("_lora.")], len(key)
    for _ in range(_MOST_DOTS):
        end = key.rfind(".", 0, end)
        starts.append(end)
        if end < 0:
            break
    return sorted(start for start in starts if start >= 0)
