"""Every name that a module of this model goes by, made from its layout. Knows how FLUX.1 is spelled; knows no suffixes.

The model is diffusers' and transformers'; files also speak of the reference implementation (github.com/
black-forest-labs/flux, `BFL`), which has q, k and v in one matrix, of x-flux's processors (`XLabs`), and of parts of
BFL's matrices (`OneTrainer`, in the form that it calls OMI). Rows are counted from the layout, so that a model of any
width and depth has its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from kontextd_models.lora.entry import Part
from kontextd_models.lora.layout import Component, Layout, Parameter

_DIFFUSERS = "diffusers"
_BFL = "BFL"
_XLABS = "XLabs"
_ONETRAINER = "OneTrainer"

_DOUBLE, _SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_IMAGE_QKV = (_DOUBLE + "attn.to_q", _DOUBLE + "attn.to_k", _DOUBLE + "attn.to_v")
_TEXT_QKV = (_DOUBLE + "attn.add_q_proj", _DOUBLE + "attn.add_k_proj", _DOUBLE + "attn.add_v_proj")
_SINGLE_QKV = (_SINGLE + "attn.to_q", _SINGLE + "attn.to_k", _SINGLE + "attn.to_v")
_SINGLE_LINEAR1 = (*_SINGLE_QKV, _SINGLE + "proj_mlp")

# The reference's name and diffusers' names of its rows, from the first to the last (diffusers'
# scripts/convert_flux_to_diffusers.py has the same table for whole checkpoints). `{}` is a block's number.
_FUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (_BFL, "img_in", ("x_embedder",)),
    (_BFL, "txt_in", ("context_embedder",)),
    (_BFL, "time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    (_BFL, "time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    (_BFL, "guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    (_BFL, "guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    (_BFL, "vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    (_BFL, "vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    (_BFL, "final_layer.linear", ("proj_out",)),
    (_BFL, "double_blocks.{}.img_mod.lin", (_DOUBLE + "norm1.linear",)),
    (_BFL, "double_blocks.{}.txt_mod.lin", (_DOUBLE + "norm1_context.linear",)),
    (_BFL, "double_blocks.{}.img_attn.qkv", _IMAGE_QKV),
    (_BFL, "double_blocks.{}.txt_attn.qkv", _TEXT_QKV),
    (_BFL, "double_blocks.{}.img_attn.proj", (_DOUBLE + "attn.to_out.0",)),
    (_BFL, "double_blocks.{}.txt_attn.proj", (_DOUBLE + "attn.to_add_out",)),
    (_BFL, "double_blocks.{}.img_attn.norm.query_norm", (_DOUBLE + "attn.norm_q",)),
    (_BFL, "double_blocks.{}.img_attn.norm.key_norm", (_DOUBLE + "attn.norm_k",)),
    (_BFL, "double_blocks.{}.txt_attn.norm.query_norm", (_DOUBLE + "attn.norm_added_q",)),
    (_BFL, "double_blocks.{}.txt_attn.norm.key_norm", (_DOUBLE + "attn.norm_added_k",)),
    (_BFL, "double_blocks.{}.img_mlp.0", (_DOUBLE + "ff.net.0.proj",)),
    (_BFL, "double_blocks.{}.img_mlp.2", (_DOUBLE + "ff.net.2",)),
    (_BFL, "double_blocks.{}.txt_mlp.0", (_DOUBLE + "ff_context.net.0.proj",)),
    (_BFL, "double_blocks.{}.txt_mlp.2", (_DOUBLE + "ff_context.net.2",)),
    (_BFL, "single_blocks.{}.modulation.lin", (_SINGLE + "norm.linear",)),
    (_BFL, "single_blocks.{}.linear1", _SINGLE_LINEAR1),
    (_BFL, "single_blocks.{}.linear1_qkv", _SINGLE_QKV),  # ComfyUI's word for x-flux's qkv_lora of a single block
    (_BFL, "single_blocks.{}.linear2", (_SINGLE + "proj_out",)),
    (_BFL, "single_blocks.{}.norm.query_norm", (_SINGLE + "attn.norm_q",)),
    (_BFL, "single_blocks.{}.norm.key_norm", (_SINGLE + "attn.norm_k",)),
    (_XLABS, "double_blocks.{}.processor.qkv_lora1", _IMAGE_QKV),
    (_XLABS, "double_blocks.{}.processor.qkv_lora2", _TEXT_QKV),
    (_XLABS, "double_blocks.{}.processor.proj_lora1", (_DOUBLE + "attn.to_out.0",)),
    (_XLABS, "double_blocks.{}.processor.proj_lora2", (_DOUBLE + "attn.to_add_out",)),
    # Of `processor.qkv_lora.down.weight` the `_lora.down.weight` is a suffix, that of diffusers before peft.
    (_XLABS, "single_blocks.{}.processor.qkv", _SINGLE_QKV),
    (_XLABS, "single_blocks.{}.processor.proj", (_SINGLE + "proj_out",)),
    # modules/util/convert/lora/convert_flux_lora.py; the other names are BFL's.
    (_ONETRAINER, "img_in.proj", ("x_embedder",)),
    *((_ONETRAINER, f"double_blocks.{{}}.img_attn.qkv.{part}", (stem,)) for part, stem in enumerate(_IMAGE_QKV)),
    *((_ONETRAINER, f"double_blocks.{{}}.txt_attn.qkv.{part}", (stem,)) for part, stem in enumerate(_TEXT_QKV)),
    *((_ONETRAINER, f"single_blocks.{{}}.linear1.{part}", (stem,)) for part, stem in enumerate(_SINGLE_LINEAR1)),
)
# The reference's last modulation gives shift and then scale (flux/modules/layers.py, LastLayer), diffusers'
# AdaLayerNormContinuous scale and then shift.
_SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
# CLIP's attention in diffusers before peft.
_OLD_CLIP = ((".to_q", ".q_proj"), (".to_k", ".k_proj"), (".to_v", ".v_proj"), (".to_out", ".out_proj"))
_CLIP_PREFIX = "text_model."  # transformers 4 has it, 5 has not: files may or may not


@dataclass(frozen=True)
class Module:
    """Where the rows of a module's weight go, and whose spelling of it that was."""

    parts: tuple[Part, ...]
    spelling: str

    @property
    def component(self) -> Component:
        return self.parts[0].parameter.component


class Names:
    """The modules of a model by the names that files have for them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._dotted: dict[tuple[Component, str], Module] = {}
        self._flat: dict[tuple[Component, str], Module | None] = {}  # None: two modules go by that name
        for name, module in modules(layout):
            self._add(name, module)

    def find(self, component: Component, name: str, *, flat: bool) -> Module | None:
        if not flat:
            return self._dotted.get((component, name))
        # One trainer leaves an underscore at the end: lora_unet_proj_out_ (kohya-ss/sd-scripts#1463).
        return self._flat.get((component, name.replace(".", "_").rstrip("_")))

    def biases(self, module: Module) -> tuple[Part, ...] | None:
        """The same rows of the biases; None where one of the parameters has none."""
        parts = tuple(
            replace(part, parameter=_parameter(module.component, part.parameter.name.removesuffix(".weight"), "bias"))
            for part in module.parts
        )
        return parts if all(part.parameter in self._layout for part in parts) else None

    def _add(self, name: str, module: Module) -> None:
        self._dotted.setdefault((module.component, name), module)
        flat = (module.component, name.replace(".", "_"))
        known = self._flat.setdefault(flat, module)
        if known is not None and known.parts != module.parts:
            self._flat[flat] = None


def modules(layout: Layout) -> Iterator[tuple[str, Module]]:
    """Every name of every module, diffusers' first."""
    for parameter in layout:
        stem, _, kind = parameter.name.rpartition(".")
        if kind != "weight":
            continue
        module = _stacked(layout, parameter.component, (stem,), _DIFFUSERS)
        if module:
            yield stem, module
            for alias in _aliases(parameter.component, stem):
                yield alias, module
    for spelling, name, stems in _FUSED:
        for number in count() if "{}" in name else (0,):
            module = _stacked(layout, Component.TRANSFORMER, [stem.format(number) for stem in stems], spelling)
            if module is None:
                break
            yield name.format(number), module
    yield from _swapped(layout)


def _stacked(layout: Layout, component: Component, stems: Sequence[str], spelling: str) -> Module | None:
    """One matrix for the weights of `stems`, one below the other; None where the model lacks one of them."""
    parts, start = [], 0
    for stem in stems:
        shape = layout.get(_parameter(component, stem, "weight"))
        if not shape:
            return None
        parts.append(Part(_parameter(component, stem, "weight"), start, start + shape[0]))
        start += shape[0]
    return Module(tuple(parts), spelling)


def _swapped(layout: Layout) -> Iterator[tuple[str, Module]]:
    name, stem = _SWAPPED
    parameter = _parameter(Component.TRANSFORMER, stem, "weight")
    if parameter in layout:
        rows = layout[parameter][0]
        half = rows // 2
        yield name, Module((Part(parameter, 0, half, at=half), Part(parameter, half, rows, at=0)), _BFL)


def _aliases(component: Component, stem: str) -> Iterator[str]:
    """Other names of a text encoder's module."""
    if component is Component.T5 and stem == "shared":
        yield "encoder.embed_tokens"  # the same tensor, under transformers' other name for it
    if component is not Component.CLIP:
        return
    bare = stem.removeprefix(_CLIP_PREFIX)
    for name in (bare, *(bare.replace(new, old) for old, new in _OLD_CLIP if bare.endswith(new))):
        yield name
        yield _CLIP_PREFIX + name


def _parameter(component: Component, stem: str, kind: str) -> Parameter:
    return Parameter(component, f"{stem}.{kind}")
