"""ΔW of each form, in float32. Knows matrices and peft's layers; knows no parameters by name and no scales of requests.

LoKr and LoHa are computed by peft's own layers, with the factors of the file put into them. The low-rank product is
written out here, because the merge fuses it with its sum (`factors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from kontextd_models.lora.adapter import Delta, Form, Full, LoHa, LoKr, LowRank, Replaced

if TYPE_CHECKING:
    from peft.tuners.lycoris_utils import LycorisLayer

Layer = TypeVar("Layer", bound="LycorisLayer")
_NAME = "file"  # of the one adapter in a layer of peft


def delta(of: Delta, base: Tensor) -> Tensor:
    """ΔW [rows, in] in float32, on the device of `base`: the pristine rows that it is added to.

    At the file's own strength: what a request asks for is multiplied afterwards, also with DoRA, whose direction would
    bend with it. So the deltas of several files add up, and their order never matters.
    """
    change = _matrix(of.form, base)[of.start : of.stop]
    if of.magnitude is None:
        return change
    return _decomposed(base.float(), change, of.magnitude.to(base.device, torch.float32))


def factors(form: LowRank, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Up [out, r] in float32 and down [r, in], whose product is scale · ΔW.

    Down is in the file's dtype where that has 16 bits: a product in float32 costs a tensor core more for each cut.
    """
    dtype = form.down.dtype if form.down.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return form.up.to(device, torch.float32) * (scale * form.factor), form.down.to(device, dtype)


def _matrix(form: Form, base: Tensor) -> Tensor:
    device = base.device
    match form:
        case LowRank():
            up, down = factors(form, 1.0, device)
            return up @ down.float()
        case LoKr():
            return _kronecker(form, device)
        case LoHa():
            return _hadamard(form, device)
        case Full(diff, factor):
            wide = diff.to(device, torch.float32)
            return wide if factor == 1 else wide * factor
        case Replaced(value):
            return value.to(device, torch.float32) - base.float()


def _decomposed(base: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m ⊙ (W + ΔW) / ‖W + ΔW‖ − W. A row or column of zeros has no direction and stays one."""
    directed = base + change
    dim = 1 if magnitude.shape == (base.shape[0], 1) else 0
    norm = torch.linalg.vector_norm(directed, dim=dim, keepdim=True)
    return directed.mul_(magnitude / norm.masked_fill_(norm == 0, 1)).sub_(base)


def _kronecker(form: LoKr, device: torch.device) -> Tensor:
    from peft.tuners.lokr.layer import Linear, LoKrLayer

    (out1, in1), (out2, in2) = _shape(form.w1), _shape(form.w2)
    layer = _peft_layer(Linear, LoKrLayer.__init__, out1 * out2, in1 * in2, form.factor)
    for slot, matrix in (("lokr_w1", form.w1), ("lokr_w2", form.w2)):
        if isinstance(matrix, Tensor):
            _put(layer, slot, matrix, device)
        else:
            _put(layer, f"{slot}_a", matrix[0], device)
            _put(layer, f"{slot}_b", matrix[1], device)
    return layer.get_delta_weight(_NAME)


def _hadamard(form: LoHa, device: torch.device) -> Tensor:
    from peft.tuners.loha.layer import Linear, LoHaLayer

    layer = _peft_layer(Linear, LoHaLayer.__init__, form.w1[0].shape[0], form.w1[1].shape[1], form.factor)
    for slot, matrix in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (*form.w1, *form.w2), strict=True):
        _put(layer, f"hada_{slot}", matrix, device)
    return layer.get_delta_weight(_NAME)


def _shape(matrix: Tensor | tuple[Tensor, Tensor]) -> tuple[int, int]:
    first, last = (matrix, matrix) if isinstance(matrix, Tensor) else matrix
    return first.shape[0], last.shape[1]


def _peft_layer(
    kind: type[Layer], begin: Callable[[Layer, nn.Module], None], out_features: int, in_features: int, factor: float
) -> Layer:
    """A layer without an adapter: `kind`'s own constructor would draw one at random, of a factorisation of its own."""
    layer = kind.__new__(kind)
    begin(layer, nn.Linear(in_features, out_features, bias=False, device="meta"))
    layer.scaling[_NAME], layer.rank_dropout[_NAME] = factor, 0.0
    return layer


def _put(layer: LycorisLayer, slot: str, matrix: Tensor, device: torch.device) -> None:
    getattr(layer, slot)[_NAME] = nn.Parameter(matrix.to(device, torch.float32), requires_grad=False)
