"""Guesses what a file was made for, when it is not our model. Knows other models' names; reads no values.

Rows of facts, the most telling first: the names of modules in reference implementations and in diffusers, with widths
and shapes where names are shared. In a row `~` stands for the dot or the underscore between two parts of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from kontextd_models.lora.dialects.suffixes import Slot, parsed
from kontextd_models.lora.entry import Kind

UNKNOWN = "an unknown architecture"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """`width`: the inputs of a module that the pattern finds; `ratio`: its outputs to its inputs; where they matter.

    `is_kin`: modules of that model's transformer have names of FLUX.1's, and some of them its shapes.
    """

    what: str
    pattern: str
    width: int | None = None
    ratio: int | None = None
    is_kin: bool = False


_EMBEDDING = re.compile(r"emb_params|string_to_(?:param|token)\b.*|clip_[lgh]|t5(?:xxl)?|<[^>]+>|\*")  # all of its keys
_OF_AN_ADAPTER = re.compile(r"lora|lokr_|hada_|\.(?:diff|diff_b|alpha|dora_scale|oft_\w+|on_input)\Z")
_UNET = r"(?:down|up|mid|input|middle|output)_blocks?~.*"
_MMDIT = r"(?<!joint_)(?<!single_)transformer_blocks~\d+~"
_DEEP_MMDIT = _MMDIT.replace(r"\d+", r"(?:19|[2-5]\d)")  # FLUX.1 has 19 and 38 blocks, Qwen-Image 60
_PAST_FLUX_1 = r"double_blocks~19~|single(?:_transformer)?_blocks~3[89]~"  # HunyuanVideo has 20 and 40
_NEXT_DIT = r"(?:layers|noise_refiner|context_refiner)~\d+~(?:attention|attn|feed_forward)~"

_ADD_ONS = (
    _Row("an IP-Adapter", r"ip_adapter|^image_proj\.|to_[kv]_ip|^redux_|^pulid"),
    _Row("a ControlNet", r"controlnet|^control_model\.|zero_convs?\.|input_hint_block|^lllite_|^adapter\.body\."),
)
_WHOLE_MODELS = (
    _Row("a full checkpoint", r"^(?:model\.)?diffusion_model\.|^(?:double_|single_|joint_)?blocks\.\d|^layers\.\d"),
    _Row(
        "a full checkpoint",
        r"^(?:transformer\.|unet\.)?(?:\w+_)?transformer_blocks\.\d|^(?:down|up)_blocks\.|^layers\.",
    ),
    _Row("a VAE", r"^(?:vae\.|first_stage_model\.)?(?:en|de)coder\.(?:down|up|mid|middle|conv_in|conv1)"),
    _Row("a text encoder", r"text_model\.|(?:^|\.)encoder\.block\.\d+\.layer|^model\.layers\.|^shared\.weight"),
)
_ARCHITECTURES = (
    _Row("FLUX.2", r"(?:double|single)_stream_modulation|to_qkv_mlp_proj|ff_context~linear_in", is_kin=True),
    _Row("FLUX.2", r"single_blocks~\d+~linear1", ratio=9),  # q, k, v and a gated MLP of 3: 3 + 2 · 3
    _Row("FLUX.2", r"double_blocks~\d+~(?:img|txt)_(?:attn|mlp)~(?:qkv|0)", width=6144),
    _Row("FLUX.2", r"double_blocks~\d+~(?:img|txt)_(?:attn|mlp)~(?:qkv|0)", width=4096),  # [klein] 9B
    _Row("Chroma", r"distilled_guidance_layer"),
    _Row("HunyuanVideo", r"token_refiner|(?:img|txt)_mlp~fc[12]|_mod~linear|modulation~linear", is_kin=True),
    _Row("HunyuanVideo", r"_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|q|k|v|proj)\b", is_kin=True),
    _Row("HunyuanVideo", _PAST_FLUX_1, width=3072, is_kin=True),
    _Row("SD 3", r"joint_blocks~\d+~(?:x|context)_block"),
    _Row("SD 3", _MMDIT + r"attn~(?:to_q|add_q_proj)", width=1536),
    _Row("SD 3", _MMDIT + r"attn~(?:to_q|add_q_proj)", width=2432),  # 3.5 large
    _Row("Qwen-Image", r"transformer_blocks~\d+~(?:img|txt)_(?:mlp|mod)~", is_kin=True),
    _Row("Qwen-Image", _DEEP_MMDIT + r"attn~add_", is_kin=True),
    _Row("Qwen-Image", _DEEP_MMDIT + r"attn~to_", width=3072, is_kin=True),
    _Row("AuraFlow", r"joint_transformer_blocks~\d+~|(?:double|single)_layers~\d+~", is_kin=True),
    _Row("HiDream", r"(?:double|single)_stream_blocks~\d+~"),
    _Row("Stable Cascade", r"lora_prior_"),
    _Row("SDXL", _UNET + r"attn2~to_[kv]\b", width=2048),
    _Row("SD 1.5", _UNET + r"attn2~to_[kv]\b", width=768),
    _Row("SD 2", _UNET + r"attn2~to_[kv]\b", width=1024),
    _Row("SDXL", r"lora_te2_text_model|text_encoder_2\.text_model|" + _UNET + r"transformer_blocks~[2-9]~"),
    _Row("SD 1.5 or SDXL", _UNET),
    _Row("Wan", r"(?:^|\.|lora_unet_+|lycoris_)blocks~\d+~(?:self_attn|cross_attn|ffn|attn[12])~"),
    _Row("Z-Image", _NEXT_DIT, width=3840),
    _Row("Lumina", _NEXT_DIT, width=2304),
    _Row("Lumina or Z-Image", r"(?:noise|context)_refiner|layers~\d+~(?:attention~|feed_forward~w)"),
    _Row("PixArt", r"transformer_blocks~\d+~attn[12]~", width=1152),
    _Row("CogVideoX", r"transformer_blocks~\d+~attn1~", width=1920),
    _Row("CogVideoX", r"transformer_blocks~\d+~attn1~", width=3072, is_kin=True),
    _Row("LTX", r"transformer_blocks~\d+~(?:attn[12]|audio_attn[12])~"),
)
# What says little: of the models that are like FLUX.1, or of text encoders that many models have.
_FAINT = (
    _Row("a FLUX.1 or Chroma of another size", r"(?:double|single)_blocks~\d+~|single_transformer_blocks~\d+~"),
    _Row("a language model", r"model~layers~\d+~(?:self_attn|mlp)~"),
    _Row("SD 1.5 or SDXL", r"^lora_te_|^text_encoder\."),
)
_ENOUGH = 1000  # modules, for a guess: a file may have 100,000


def looks_like(keys: Iterable[str], shapes: Mapping[str, Shape]) -> str:
    """The likeliest origin of a file with these tensors: a model's name, or what it is instead of a LoRA."""
    names = tuple(keys)
    if names and all(_EMBEDDING.fullmatch(name) for name in names):
        return "a textual-inversion embedding"
    modules = _modules(names, shapes)
    found = _first(_ADD_ONS, modules)
    if not found and not any(_OF_AN_ADAPTER.search(name) for name in names):
        found = _first(_WHOLE_MODELS, modules)
    return found or _first(_ARCHITECTURES + _FAINT, modules) or UNKNOWN


def other_model(keys: Iterable[str], shapes: Mapping[str, Shape], *, only_kin: bool = False) -> str | None:
    """The model other than FLUX.1 that these tensors are surely of; None where they do not say so.

    `only_kin`: one of those alone whose files may fit FLUX.1 in part.
    """
    return _first((row for row in _ARCHITECTURES if row.is_kin or not only_kin), _modules(keys, shapes))


def _first(rows: Iterable[_Row], modules: Mapping[str, Shape]) -> str | None:
    for row in rows:
        pattern = re.compile(row.pattern.replace("~", "[._]"))
        if any(pattern.search(name) and _fits(row, shape) for name, shape in modules.items()):
            return row.what
    return None


def _fits(row: _Row, shape: Shape) -> bool:
    if row.width is None and row.ratio is None:
        return True
    if not shape:
        return False
    outputs, inputs = shape
    return row.width in (None, inputs) and (row.ratio is None or outputs == row.ratio * inputs)


def _modules(names: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """[out, in] of modules from all over the file, by their low-rank pairs; () where they are not known."""
    sides: dict[str, dict[str, int]] = {}
    for name in names:
        module, slot = parsed(name) or (name, None)
        found, shape = sides.setdefault(module, {}), shapes.get(name, ())
        if slot in _SIDES and len(shape) >= 2:
            found[_SIDES[slot][0]] = shape[_SIDES[slot][1]]
    some = islice(sides.items(), 0, None, max(1, len(sides) // _ENOUGH))
    return {module: (of["out"], of["in"]) if len(of) == 2 else () for module, of in some}


_SIDES = {Slot(Kind.LOW_RANK, "up"): ("out", 0), Slot(Kind.LOW_RANK, "down"): ("in", 1)}
