"""Adapters made by hand, and what peft makes of the same factors in float64. For tests only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from kontextd_models.lora.adapter import Adapter, Delta, Form, Full, LoHa, LoKr, LowRank
from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.layout import Component, Parameter
from kontextd_models.lora.merging import Merger
from kontextd_models.lora.pristine import Copies, parameters_of
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

CPU = torch.device("cpu")
KINDS = ("low-rank", "low-rank DoRA", "LoKr", "LoKr of products", "LoHa", "LoHa DoRA", "full")


class Factors:
    """Random matrices of the sizes that trained ones have, the same for the same seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.random, self.dtype = torch.Generator().manual_seed(seed), dtype

    def matrix(self, rows: int, columns: int, size: float = 0.1) -> Tensor:
        return (torch.randn(rows, columns, generator=self.random) * size).to(self.dtype)

    def pick(self, *choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=self.random))]

    def form(self, kind: str, out: int, columns: int, rank: int) -> Form:
        low, high = _split(out), _split(columns)
        match kind.partition(" DoRA")[0]:
            case "low-rank":
                return LowRank(self.matrix(out, rank), self.matrix(rank, columns), 0.5)
            case "LoKr":
                return LoKr(self.matrix(low[0], high[0], 0.3), self.matrix(low[1], high[1], 0.3), 0.5)
            case "LoKr of products":
                w1 = self.matrix(low[0], rank), self.matrix(rank, high[0])
                return LoKr(w1, (self.matrix(low[1], rank), self.matrix(rank, high[1])), 2.0)
            case "LoHa":
                w1 = self.matrix(out, rank, 0.3), self.matrix(rank, columns, 0.3)
                return LoHa(w1, (self.matrix(out, rank, 0.3), self.matrix(rank, columns, 0.3)), 0.25)
            case "full":
                return Full(self.matrix(out, columns, 0.03))
        raise ValueError(kind)

    def delta(self, kind: str, base: Tensor, rank: int = 4) -> Delta:
        """For all rows of a weight [out, in]; DoRA's magnitudes are its norms and a little more or less."""
        out, columns = base.shape
        magnitude = None
        if kind.endswith("DoRA"):
            norms = base.float().norm(dim=1, keepdim=True)
            magnitude = (norms * (1 + self.matrix(out, 1).float())).to(self.dtype)
        return Delta(self.form(kind, out, columns, rank), 0, out, magnitude=magnitude)


def adapter(deltas: Mapping[Parameter, Delta | tuple[Delta, ...]], name: str) -> Adapter:
    key = hashlib.sha256(name.encode()).hexdigest()
    found = {at: one if isinstance(one, tuple) else (one,) for at, one in deltas.items()}
    return Adapter(key, found, Coverage(("by hand",), 1, 1), size_bytes=1000)


def linears(pipeline: object) -> dict[Parameter, nn.Parameter]:
    """The weights of all linears of the three components, in the model's order."""
    weights = {}
    for component in Component:
        for name, module in getattr(pipeline, component.value).named_modules():
            if isinstance(module, nn.Linear):
                weights[Parameter(component, f"{name}.weight")] = module.weight
    return weights


def style(pipeline: object, seed: int, *kinds: str, every: int = 1, rank: int | None = None) -> Adapter:
    """An adapter of these kinds in turn, for every so-manieth linear of a pipeline."""
    factors, deltas = Factors(seed), {}
    for index, (at, weight) in enumerate(list(linears(pipeline).items())[seed % every :: every]):
        deltas[at] = factors.delta(kinds[index % len(kinds)], weight, rank or factors.pick(1, 4, 7, 16))
    return adapter(deltas, f"style {seed}")


def pipeline_of(transformer: nn.Module) -> SimpleNamespace:
    """A pipeline whose text encoders have nothing to merge into."""
    return SimpleNamespace(transformer=transformer, text_encoder=nn.Identity(), text_encoder_2=nn.Identity())


def merger_of(pipeline: object) -> Merger:
    return Merger(pipeline, Copies(parameters_of(pipeline), CPU), CPU)


def digest(pipeline: object) -> str:
    """SHA-256 over every parameter of the three components."""
    sha = hashlib.sha256()
    for value in parameters_of(pipeline).values():
        sha.update(value.detach().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


# What peft makes of it, in float64.


def exact_delta(of: Delta, base: Tensor) -> Tensor:
    """ΔW by peft's own layers, [rows, in] in float64, for the pristine rows `base`."""
    if of.magnitude is None:
        return _by_peft(of.form)[of.start : of.stop]
    if isinstance(of.form, LowRank) and of.magnitude.shape[1] == 1:
        return _dora_by_peft(of.form, of.magnitude, base)
    directed = base.double() + exact_delta(Delta(of.form, of.start, of.stop), base)  # peft has no other DoRA
    dim = 1 if of.magnitude.shape == (len(base), 1) else 0
    return of.magnitude.double() * directed / directed.norm(dim=dim, keepdim=True) - base.double()


def exact_sum(base: Tensor, scaled: list[tuple[Delta, float]]) -> Tensor:
    total = base.double()
    for one, scale in scaled:
        rows = slice(one.at, one.at + one.stop - one.start)
        total[rows] += scale * exact_delta(one, base[rows])
    return total


def errors(ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """Our relative error, and the one of rounding the exact sum once: the floor of this dtype."""
    size = exact.norm()
    return (
        float((ours.double() - exact).norm() / size),
        float((exact.to(ours.dtype).double() - exact).norm() / size),
    )


def _by_peft(form: Form) -> Tensor:
    match form:
        case LowRank():
            return _lora_layer(form, nn.Linear(form.down.shape[1], form.up.shape[0], bias=False, dtype=torch.float64))
        case LoKr():
            out, columns = (_side(form.w1, n) * _side(form.w2, n) for n in (0, 1))
            layer = LoKrLinear(_linear(out, columns), "a", LoKrConfig(), r=1, alpha=form.factor)
            slots = {"lokr_w1": form.w1, "lokr_w2": form.w2}
        case LoHa():
            layer = LoHaLinear(_linear(len(form.w1[0]), form.w1[1].shape[1]), "a", LoHaConfig(), r=1, alpha=form.factor)
            slots = {"hada_w1": form.w1, "hada_w2": form.w2}
        case Full():
            return form.diff.double()
    for slot in layer.adapter_layer_names:
        getattr(layer, slot).clear()
    for slot, matrix in slots.items():
        for end, part in zip(("_a", "_b"), matrix, strict=True) if isinstance(matrix, tuple) else [("", matrix)]:
            getattr(layer, slot + end)["a"] = nn.Parameter(part.double())
    return layer.get_delta_weight("a").detach()


def _lora_layer(form: LowRank, linear: nn.Linear, magnitude: Tensor | None = None) -> Tensor:
    """ΔW; with a magnitude the merged weight."""
    rank = form.down.shape[0]
    config = LoraConfig(r=rank, lora_alpha=1, use_dora=magnitude is not None, init_lora_weights=False)
    layer = LoraLinear(linear, "a", config, r=rank, lora_alpha=1)
    layer.scaling["a"] = form.factor
    layer.lora_A["a"].weight = nn.Parameter(form.down.double())
    layer.lora_B["a"].weight = nn.Parameter(form.up.double())
    if magnitude is None:
        return layer.get_delta_weight("a").detach()
    layer.lora_magnitude_vector["a"].weight = nn.Parameter(magnitude.double().flatten())
    layer.merge()
    return layer.get_base_layer().weight.detach()


def _dora_by_peft(form: LowRank, magnitude: Tensor, base: Tensor) -> Tensor:
    linear = _linear(*base.shape)
    linear.weight = nn.Parameter(base.double())
    return _lora_layer(form, linear, magnitude) - base.double()


def _linear(out: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, out, bias=False, dtype=torch.float64)


def _side(factor: Tensor | tuple[Tensor, Tensor], dim: int) -> int:
    return factor.shape[dim] if isinstance(factor, Tensor) else factor[dim].shape[dim]


def _split(side: int) -> tuple[int, int]:
    """Not as peft would: the smaller factor is the larger one that is no more than a quarter of its root."""
    first = next(n for n in range(max(1, int(side**0.5) // 2), 0, -1) if side % n == 0)
    return first, side // first
