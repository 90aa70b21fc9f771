"""Where Triton kernels run, and the dtypes that they take. Knows tensors and devices; knows no ops."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
log = logging.getLogger(__name__)


def goes_to_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and triton_is_there()


@functools.cache
def triton_is_there() -> bool:
    """It comes with torch's builds for CUDA. Warns once where it is missing."""
    there = importlib.util.find_spec("triton") is not None
    if not there:
        log.warning("triton is not installed: what our kernels do is done on the GPU by plain torch, which is slower")
    return there
