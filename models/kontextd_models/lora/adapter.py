"""A LoRA in memory: what it adds to which parameter. Knows forms and tensors; knows no key names and no merging.

Tensors stay in the dtype of the file; `factor` is alpha / r (or what stands for it). W, ΔW are [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kontextd_models.lora.coverage import Coverage
from kontextd_models.lora.layout import Parameter


@dataclass(frozen=True)
class LowRank:
    """ΔW = factor · up @ down (Hu et al. 2021, arXiv:2106.09685)."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in]
    factor: float


@dataclass(frozen=True)
class LoKr:
    """ΔW = factor · kron(w1, w2), each of them whole or a product a @ b (LyCORIS, arXiv:2309.14859)."""

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor | tuple[Tensor, Tensor]
    factor: float


@dataclass(frozen=True)
class LoHa:
    """ΔW = factor · (w1_a @ w1_b) ⊙ (w2_a @ w2_b) (FedPara, arXiv:2108.06098)."""

    w1: tuple[Tensor, Tensor]  # [out, r], [r, in]
    w2: tuple[Tensor, Tensor]
    factor: float


@dataclass(frozen=True)
class Full:
    """ΔW = factor · diff, [out, in] or [n]. Only of the bias of a low-rank pair is the factor other than 1."""

    diff: Tensor
    factor: float = 1.0


@dataclass(frozen=True)
class Replaced:
    """ΔW = value − W, [out, in] or [n]: what was trained is the weight itself."""

    value: Tensor


Form: TypeAlias = LowRank | LoKr | LoHa | Full | Replaced


@dataclass(frozen=True)
class Delta:
    """A form, or the rows `start` to `stop` of it, added to a parameter from its row `at` on.

    The rows of LoKr and LoHa are cut when they are used; those of all other forms are cut when they are read. With a
    `magnitude` (DoRA, arXiv:2402.09353) the delta is m ⊙ (W + ΔW) / ‖W + ΔW‖ − W, normed over each row for [rows, 1],
    over each column for [1, in].
    """

    form: Form
    start: int
    stop: int
    at: int = 0
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """One file, whole. `key`: SHA-256 of its bytes; `size_bytes`: of its tensors."""

    key: str
    deltas: Mapping[Parameter, tuple[Delta, ...]]
    coverage: Coverage
    size_bytes: int
