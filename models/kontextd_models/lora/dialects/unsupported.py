"""Names the form of what no entry took: changes of weights that LoRA files may hold and that are not merged here.

Knows the ends of names; decides nothing. Sources: `weight_list` of each of lycoris/modules, the `prefix` of each of
peft's tuners, nunchaku's converter, ComfyUI's comfy/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names of forms, with the keys that give them away. The first that any key matches is the answer.
_FORMS = (
    ("a Tucker decomposition (lora_mid, t1, t2)", r"\.(lora_mid\.weight|(hada|lokr)_t[12](\.[^.]+)?)"),
    ("split projections with numbered matrices (lora_down.0)", r"\.lora_(down|up)\.\d+\.weight"),
    ("GLoRA", r"\.([ab][12]|bm)\.weight|\.glora_\w+(\.[^.]+)*"),
    ("BOFT", r"\.boft_[RsP](\.[^.]+)*"),
    ("OFT", r"\.oft_(blocks|diag|R|r|vec)(\.[^.]+)*"),
    ("IA3", r"\.(on_input|ia3_l(\.[^.]+)*)"),
    ("VeRA", r"\.vera_(lambda_[bd]|[AB])(\.[^.]+)*"),
    ("T-LoRA", r"\.([pq]_layer\.weight|lambda_layer)"),
    ("AdaLoRA", r"\.lora_E(\.[^.]+)?"),
    ("a LoRA of embeddings (lora_embedding_A)", r"\.lora_embedding_[AB](\.[^.]+)*"),
    ("replacement weights (set_weight, reshape_weight)", r"\.(set_weight|reshape_weight)"),
    ("modules that were trained whole (modules_to_save)", r"\.modules_to_save\..+"),
    ("a LoRA packed for SVDQuant (nunchaku)", r"\.lora_(down|up)"),
)
_PEFT_TUNERS = (
    "adamss|beft|bone|c3a|deft|delora|fourierft|frod|gralora|hira|hra|lily|ln_tuning|miss|osf|peanut|poly|psoft|pvera|"
    "randlora|road|shadow|shira|supertuning|tinylora|trainable_tokens|unilora|vblora|waveft"
)
_TUNER = re.compile(rf"\.({_PEFT_TUNERS})_[^.]+(\.[^.]+)?\Z")
_COMPILED = tuple((form, re.compile(rf"(?:{pattern})\Z")) for form, pattern in _FORMS)
_SEGMENTS = 3  # no suffix has more


def unsupported_form(keys: Iterable[str]) -> str | None:
    """Which form, that cannot be merged here, the unmatched keys of a file are of; None for none that is known."""
    ends = {"." + ".".join(key.split(".")[-_SEGMENTS:]) for key in keys}
    for form, pattern in _COMPILED:
        if any(pattern.search(end) for end in ends):
            return form
    tuners = sorted({found[1] for end in ends if (found := _TUNER.search(end))})
    return f"peft's {tuners[0]}" if tuners else None
