"""What a row of the table of ops says: how an op is called, on what it is tried, and how far off it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One set of inputs; `inputs(device)` gives the same values every time.

    `size_bytes` and `flops` are the least the op can do: each input read and each output written once.
    """

    name: str
    inputs: Callable[[torch.device], Inputs]
    size_bytes: int
    flops: int


@dataclass(frozen=True)
class Tolerance:
    """|got − exact| ≤ rounding · |exact| + of_peak · (largest of the row) + least + accumulation · magnitude.

    The magnitude is what the op makes of the absolute values of its inputs: the sum of the sizes of all its terms.
    """

    rounding: float
    of_peak: float
    least: float
    accumulation: float
    reason: str


@dataclass(frozen=True)
class Op:
    """`reference` defines the op, `launcher` is what others call; both take the inputs of a case.

    `exact` takes them in fp64 and gives the result before it is rounded; `values` reads a result back into fp64. The
    tolerance goes by the dtype of the result, of its first tensor where it has several. `awkward` cases are for tests;
    `ours` are the shapes of the model, for the benchmark, by kind of device. A launcher that `takes_memory` is given
    that of its results after the inputs. An op that `has_compiled_rival` is measured beside its reference as torch's
    compiler makes it: a kernel that is not faster than that is deleted.
    """

    name: str
    reference: Callable[..., Result]
    launcher: Callable[..., Result]
    exact: Callable[..., Tensor]
    values: Callable[[Result], Tensor]
    tolerance: Mapping[torch.dtype, Tolerance]
    awkward: tuple[Case, ...]
    ours: Mapping[str, tuple[Case, ...]]
    takes_memory: bool = True
    has_compiled_rival: bool = False

    def excess(self, inputs: Inputs, result: Result) -> float:
        """The largest error of `result` in units of what is allowed: at most 1 where the op is right, NaN for NaN."""
        exact = self.exact(*(tensor.double() for tensor in inputs))
        magnitude = self.exact(*(tensor.double().abs() for tensor in inputs))
        first = result if isinstance(result, Tensor) else result[0]
        allowed = self.tolerance[first.dtype]
        bound = allowed.rounding * exact.abs() + allowed.accumulation * magnitude + allowed.least
        bound += allowed.of_peak * exact.abs().amax(dim=-1, keepdim=True)
        return ((self.values(result) - exact).abs() / bound).max().item()
