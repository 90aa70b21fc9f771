"""Writes LoRA files in every dialect and form, with what they have to add to which parameter. For tests only.

It has tables of its own for how trainers spell FLUX.1, not those that it tests. `build` is the way in, `CASES` what it
can write; `evaluated` turns what the code under test made of a file into deltas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from kontextd_models.lora.entry import Entry, Kind, Normalised
from kontextd_models.lora.layout import Component, Layout, Parameter
from torch import Tensor

Weights = Mapping[Parameter, Tensor]
Deltas = dict[Parameter, Tensor]  # float64

_LAST_MODULATION = "final_layer.adaLN_modulation.1"
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    _LAST_MODULATION: "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
}
_XLABS_DOUBLE = {
    "processor.qkv_lora1": "attn.to_q attn.to_k attn.to_v",
    "processor.qkv_lora2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "processor.proj_lora1": "attn.to_out.0",
    "processor.proj_lora2": "attn.to_add_out",
}
_XLABS_SINGLE = {"processor.qkv_lora": "attn.to_q attn.to_k attn.to_v", "processor.proj_lora": "proj_out"}


@dataclass(frozen=True)
class Dialect:
    """How one trainer writes. `clip` and `t5`: the prefixes of text encoders, where it trains them."""

    spelling: str  # of the transformer: "diffusers", "BFL", "XLabs"
    prefix: str
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    clip: str | None = None
    t5: str | None = None
    flat: bool = False
    has_alpha: bool = False


DIALECTS = {
    "diffusers": Dialect("diffusers", "transformer.", clip="text_encoder.", t5="text_encoder_2."),
    "diffusers with alpha": Dialect("diffusers", "transformer.", clip="text_encoder.text_model.", has_alpha=True),
    "diffusers before peft": Dialect(
        "diffusers", "transformer.", "lora.down.weight", "lora.up.weight", "text_encoder.text_model.", has_alpha=True
    ),
    "diffusers, linear layers": Dialect(
        "diffusers", "transformer.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "text_encoder."
    ),
    "diffusers without prefix": Dialect("diffusers", ""),
    "diffusers with lora_down": Dialect(
        "diffusers", "transformer.", "lora_down.weight", "lora_up.weight", has_alpha=True
    ),
    "peft": Dialect("diffusers", "base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "fal trainer": Dialect("BFL", "base_model.model."),
    "kohya": Dialect(
        "BFL", "lora_unet_", "lora_down.weight", "lora_up.weight", "lora_te1_text_model_", "lora_te3_", True, True
    ),
    "kohya before te3": Dialect(
        "BFL", "lora_unet_", "lora_down.weight", "lora_up.weight", "lora_te1_text_model_", "lora_te2_", True, True
    ),
    "kohya, diffusers names": Dialect(
        "diffusers", "lora_unet_", "lora_down.weight", "lora_up.weight", "lora_te_text_model_", flat=True
    ),
    "ComfyUI": Dialect(
        "BFL",
        "diffusion_model.",
        clip="text_encoders.clip_l.transformer.text_model.",
        t5="text_encoders.t5xxl.transformer.",
        has_alpha=True,
    ),
    "ComfyUI with lora_down": Dialect("BFL", "diffusion_model.", "lora_down.weight", "lora_up.weight", has_alpha=True),
    "ComfyUI, diffusers names": Dialect("diffusers", "diffusion_model."),
    "BFL": Dialect("BFL", ""),
    "XLabs": Dialect("XLabs", "", "down.weight", "up.weight"),
    "XLabs for ComfyUI": Dialect("XLabs", "diffusion_model.", "down.weight", "up.weight"),
    "OneTrainer": Dialect(
        "diffusers",
        "lora_transformer_",
        "lora_down.weight",
        "lora_up.weight",
        "lora_te1_text_model_",
        "lora_te2_",
        True,
        True,
    ),
    "LyCORIS": Dialect("diffusers", "lycoris_", "lora_down.weight", "lora_up.weight", flat=True, has_alpha=True),
}
FORMS = ("lora", "biased", "dora", "lokr", "loha", "full")
# x-flux writes low-rank matrices only, and so did diffusers before peft. Biases are peft's.
CASES = [
    (dialect, form)
    for dialect, writes in DIALECTS.items()
    for form in FORMS
    if form == "lora" or not writes.down.startswith(("down", "lora.", "lora_linear"))
    if form != "biased" or writes.up.startswith("lora_B")
]


@dataclass(frozen=True)
class Matrix:
    """A module as a file names it. Its rows `start` to `stop` belong to a parameter, from row `at` on."""

    name: str
    rows: tuple[tuple[Parameter, int, int, int], ...]
    shape: tuple[int, int]


@dataclass
class LoraFile:
    """`expected` is worked out when it is asked for: of a model of full size it would not fit."""

    layout: Layout
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    deltas: list[tuple[Matrix, Callable[[], Tensor]]] = field(default_factory=list)

    @cached_property
    def expected(self) -> Deltas:
        """What each parameter gains at scale 1."""
        gains: Deltas = {}
        for matrix, delta in self.deltas:
            value = delta()
            for parameter, start, stop, at in matrix.rows:
                gain = gains.setdefault(parameter, torch.zeros(self.layout[parameter], dtype=torch.float64))
                gain[at : at + stop - start] += value[start:stop]
        return gains


def build(
    layout: Layout,
    dialect: str,
    *,
    form: str = "lora",
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
    integers: bool = False,
    only: Callable[[str], bool] = lambda name: True,
) -> LoraFile:
    """A file of one dialect and form over every matrix that the dialect can name, or those that `only` says.

    `alpha`: default twice the rank where the dialect writes one. `weights`: the model's, for DoRA. `integers`: whole
    numbers small enough for every product to be exact. Values of files without are drawn small, as trained ones are.
    """
    writes, file = DIALECTS[dialect], LoraFile(layout)
    draw = _Draw(torch.Generator().manual_seed(seed), dtype, integers)
    for matrix in matrices(layout, writes):
        if only(matrix.name):
            scale = (
                alpha if alpha is not None else (2.0 * rank if writes.has_alpha or form in ("lokr", "loha") else None)
            )
            _FORM[form](file, matrix, writes, draw, rank, scale, weights)
    return file


def adapter_metadata(**values: object) -> dict[str, str]:
    """What diffusers puts into a header; a name may hold a component: `adapter_metadata(**{"transformer.r": 4})`."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps(values)}


def matrices(layout: Layout, writes: Dialect) -> Iterator[Matrix]:
    """Every matrix of the model, by the names that a dialect has for them, with its prefixes."""
    for name, stems in _transformer_names(layout, writes.spelling):
        matrix = _matrix(layout, Component.TRANSFORMER, name, stems, writes.prefix, writes.flat)
        if matrix:
            yield matrix
    for component, prefix in ((Component.CLIP, writes.clip), (Component.T5, writes.t5)):
        for stem in _stems(layout, component) if prefix is not None else ():
            matrix = _matrix(layout, component, stem.removeprefix("text_model."), (stem,), prefix or "", writes.flat)
            if matrix and ".relative_attention_bias" not in stem and "embed" not in stem and stem != "shared":
                yield matrix


def evaluated(
    read: Normalised, tensors: Mapping[str, Tensor], layout: Layout, weights: Weights | None = None
) -> Deltas:
    """The deltas of a file's entries at scale 1, each matrix made whole and then cut, in float64."""
    gains: Deltas = {}
    for entry in read.entries:
        delta = _delta(entry, {slot: tensors[key].double() for slot, key in entry.tensors.items()})
        if "dora_scale" in entry.tensors:
            assert weights is not None
            base = torch.empty_like(delta)
            for part in entry.parts:
                base[part.start : part.stop] = weights[part.parameter][part.at :][: part.stop - part.start].double()
            delta = _dora(base, delta, tensors[entry.tensors["dora_scale"]].double())
        changes = [(part, delta) for part in entry.parts]
        if entry.bias_parts:
            of = {slot: tensors[key].double() for slot, key in entry.tensors.items()}
            changes += [(part, _scale(entry, of) * of["bias"]) for part in entry.bias_parts]
        for part, change in changes:
            gain = gains.setdefault(part.parameter, torch.zeros(layout[part.parameter], dtype=torch.float64))
            gain[part.at : part.at + part.stop - part.start] += change[part.start : part.stop]
    return gains


def _transformer_names(layout: Layout, spelling: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if spelling == "diffusers":
        yield from ((stem, (stem,)) for stem in _stems(layout, Component.TRANSFORMER))
        return
    double, single = (_DOUBLE, _SINGLE) if spelling == "BFL" else (_XLABS_DOUBLE, _XLABS_SINGLE)
    yield from ((name, (stem,)) for name, stem in _TOP.items() if spelling == "BFL")
    for theirs, ours, table in (("double", "", double), ("single", "single_", single)):
        for number in range(_blocks(layout, f"{ours}transformer_blocks.")):
            block = f"{ours}transformer_blocks.{number}."
            for name, stems in table.items():
                yield f"{theirs}_blocks.{number}.{name}", tuple(block + stem for stem in stems.split())


def _blocks(layout: Layout, start: str) -> int:
    return len(
        {p.name.split(".")[1] for p in layout if p.component is Component.TRANSFORMER and p.name.startswith(start)}
    )


def _stems(layout: Layout, component: Component) -> Iterator[str]:
    for parameter, shape in layout.items():
        if parameter.component is component and parameter.name.endswith(".weight") and len(shape) == 2:
            yield parameter.name.removesuffix(".weight")


def _matrix(
    layout: Layout, component: Component, name: str, stems: tuple[str, ...], prefix: str, flat: bool
) -> Matrix | None:
    parameters = [Parameter(component, f"{stem}.weight") for stem in stems]
    if any(parameter not in layout for parameter in parameters):
        return None
    sizes = [layout[parameter][0] for parameter in parameters]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    rows = tuple((p, start, start + size, 0) for p, start, size in zip(parameters, starts, sizes, strict=True))
    if name == _LAST_MODULATION:  # shift and scale in the reference's order, scale and shift in diffusers'
        (only,), half = parameters, sizes[0] // 2
        rows = ((only, 0, half, half), (only, half, 2 * half, 0))
    return Matrix(prefix + (name.replace(".", "_") if flat else name), rows, (sum(sizes), layout[parameters[0]][1]))


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    dtype: torch.dtype
    integers: bool

    def __call__(self, *shape: int) -> Tensor:
        if self.integers:
            return torch.randint(-2, 3, shape, generator=self.generator).to(self.dtype)
        return (torch.randn(shape, generator=self.generator) * 0.05).to(self.dtype)


def _write_lora(
    file: LoraFile, matrix: Matrix, writes: Dialect, draw: _Draw, rank: int, alpha: float | None, _: Weights | None
) -> None:
    down, up = draw(rank, matrix.shape[1]), draw(matrix.shape[0], rank)
    file.tensors[f"{matrix.name}.{writes.down}"] = down
    file.tensors[f"{matrix.name}.{writes.up}"] = up
    scale = _write_alpha(file, matrix, alpha if writes.has_alpha else None, rank)
    file.deltas.append((matrix, lambda: scale * up.double() @ down.double()))


def _write_biased(
    file: LoraFile, matrix: Matrix, writes: Dialect, draw: _Draw, rank: int, alpha: float | None, _: Weights | None
) -> None:
    _write_lora(file, matrix, writes, draw, rank, alpha, None)
    scale = alpha / rank if alpha is not None and writes.has_alpha else 1.0
    biases = _biases(file, matrix)
    if biases:
        bias = draw(matrix.shape[0])
        file.tensors[f"{matrix.name}.{writes.up.replace('weight', 'bias')}"] = bias
        file.deltas.append((biases, lambda: scale * bias.double()))


def _write_dora(
    file: LoraFile,
    matrix: Matrix,
    writes: Dialect,
    draw: _Draw,
    rank: int,
    alpha: float | None,
    weights: Weights | None,
) -> None:
    assert weights is not None, "the delta of a DoRA depends on the weights"
    _write_lora(file, matrix, writes, draw, rank, alpha, None)
    _, plain = file.deltas.pop()
    base = torch.zeros(matrix.shape, dtype=torch.float64)
    for parameter, start, stop, at in matrix.rows:
        base[start:stop] = weights[parameter][at : at + stop - start].double()
    magnitude = base.norm(dim=1, keepdim=True).to(draw.dtype) * (1 + draw(matrix.shape[0], 1))
    peft = writes.up.startswith("lora_B")
    name = "lora_magnitude_vector.weight" if peft else "dora_scale"
    file.tensors[f"{matrix.name}.{name}"] = magnitude.squeeze(1) if peft else magnitude
    file.deltas.append((matrix, lambda: _dora(base, plain(), magnitude.double())))


def _write_lokr(
    file: LoraFile, matrix: Matrix, writes: Dialect, draw: _Draw, rank: int, alpha: float | None, _: Weights | None
) -> None:
    """The first factor whole in every other module, the second never: without a product there is no scale."""
    rows, columns = (math.gcd(side, 4) for side in matrix.shape)
    second = draw(matrix.shape[0] // rows, rank), draw(rank, matrix.shape[1] // columns)
    tensors = {"lokr_w2_a": second[0], "lokr_w2_b": second[1]}
    if len(file.deltas) % 2:
        tensors["lokr_w1"] = first = draw(rows, columns)
    else:
        tensors |= {"lokr_w1_a": draw(rows, rank), "lokr_w1_b": draw(rank, columns)}
        first = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    file.tensors |= {f"{matrix.name}.{name}": tensor for name, tensor in tensors.items()}
    scale = _write_alpha(file, matrix, alpha, rank)
    file.deltas.append((matrix, lambda: scale * torch.kron(first.double(), second[0].double() @ second[1].double())))


def _write_loha(
    file: LoraFile, matrix: Matrix, writes: Dialect, draw: _Draw, rank: int, alpha: float | None, _: Weights | None
) -> None:
    out, inputs = matrix.shape
    a, b, c, d = draw(out, rank), draw(rank, inputs), draw(out, rank), draw(rank, inputs)
    for name, tensor in (("hada_w1_a", a), ("hada_w1_b", b), ("hada_w2_a", c), ("hada_w2_b", d)):
        file.tensors[f"{matrix.name}.{name}"] = tensor
    scale = _write_alpha(file, matrix, alpha, rank)
    file.deltas.append((matrix, lambda: scale * (a.double() @ b.double()) * (c.double() @ d.double())))


def _write_full(
    file: LoraFile, matrix: Matrix, writes: Dialect, draw: _Draw, rank: int, alpha: float | None, _: Weights | None
) -> None:
    """With the bias, where the module has one."""
    difference = draw(*matrix.shape)
    file.tensors[f"{matrix.name}.diff"] = difference
    file.deltas.append((matrix, difference.double))
    biases = _biases(file, matrix)
    if biases:
        bias = draw(matrix.shape[0])
        file.tensors[f"{matrix.name}.diff_b"] = bias
        file.deltas.append((biases, bias.double))


def _biases(file: LoraFile, matrix: Matrix) -> Matrix | None:
    """The biases of the same rows, where the module has some."""
    rows = tuple(
        (Parameter(parameter.component, parameter.name.removesuffix("weight") + "bias"), start, stop, at)
        for parameter, start, stop, at in matrix.rows
    )
    return Matrix(matrix.name, rows, matrix.shape) if all(row[0] in file.layout for row in rows) else None


_FORM = {
    "lora": _write_lora,
    "biased": _write_biased,
    "dora": _write_dora,
    "lokr": _write_lokr,
    "loha": _write_loha,
    "full": _write_full,
}


def _write_alpha(file: LoraFile, matrix: Matrix, alpha: float | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    file.tensors[f"{matrix.name}.alpha"] = torch.tensor(alpha)
    return alpha / rank


def _delta(entry: Entry, of: Mapping[str, Tensor]) -> Tensor:
    def factor(name: str) -> Tensor:
        return of[name] if name in of else of[f"{name}_a"] @ of[f"{name}_b"]

    scale = _scale(entry, of)
    if entry.kind is Kind.LOW_RANK:
        return scale * of["up"] @ of["down"]
    if entry.kind is Kind.LOKR:
        return scale * torch.kron(factor("w1"), factor("w2"))
    if entry.kind is Kind.LOHA:
        return scale * factor("w1") * factor("w2")
    return of["diff"]


def _scale(entry: Entry, of: Mapping[str, Tensor]) -> float:
    inner = next((of[slot] for slot in ("down", "w2_b", "w1_b") if slot in of), None)
    alpha = float(of["alpha"]) if "alpha" in of else entry.alpha
    if alpha is None or inner is None:
        return 1.0
    return alpha / (math.sqrt(inner.shape[0]) if entry.rank_stabilised else inner.shape[0])


def _dora(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    moved = base + delta
    return magnitude.reshape(-1, 1) * moved / moved.norm(dim=1, keepdim=True) - base
