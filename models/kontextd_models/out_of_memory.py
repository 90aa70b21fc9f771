"""Which errors say that memory ran out. Knows how torch and CUDA's libraries word it; knows no engine, frees nothing.

| who could not allocate | how it comes to Python |
|---|---|
| torch's allocator for CUDA, Python | `torch.OutOfMemoryError`, `MemoryError` |
| CUDA's runtime, such as pinned host memory | `torch.AcceleratorError` with error code 2 |
| cuBLAS, cuDNN, CUDA's driver, Triton; torch's allocator for the CPU | `RuntimeError`, the reason in its text only |
| torch's allocator for CUDA, while torch compiles | the compiler's own `RuntimeError`, the class in its text only |

cuBLAS and cuDNN allocate outside of torch's allocator: handles, workspaces, kernels that are loaded on first use. Their
statuses are NVIDIA's names, put into the text by torch (ATen/cuda/Exceptions.h); that torch reports them so is tried
nowhere here, where there is no GPU. Some statuses stand for a full device and for other faults: these count only where
next to nothing is free.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

_CUDA_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation (CUDA Runtime API, cudaError_t)
_CERTAIN = re.compile(
    r"\bCUBLAS_STATUS_ALLOC_FAILED\b"
    r"|\bCUDNN_STATUS_ALLOC_FAILED\b"  # cuDNN 8; the two below are what cuDNN 9 has in its place
    r"|\bCUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED\b"
    r"|\bCUDA driver error: out of memory\b"
    r"|\bOutOfMemoryError: CUDA out of memory\b"  # such as BackendCompilerFailed quotes it
    r"|\bTriton Error \[CUDA\]: out of memory\b"
    r"|\bDefaultCPUAllocator: can't allocate memory\b"
)
# What making a handle or loading a kernel may answer on a full device, and on a broken one.
_AMBIGUOUS = re.compile(
    r"\bCUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create\b"
    r"|\bcuDNN error: CUDNN_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)\b"
)
_SCARCE_BYTES = 512 * 2**20  # cuDNN's kernels took up to 500 MB when loaded (pytorch/pytorch issue 81620)


def is_out_of_memory(error: BaseException, free_bytes: Callable[[], int] | None = None) -> bool:
    """`free_bytes` says what is free on a CUDA device; it is asked only where the error leaves it open."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_MEMORY_ALLOCATION
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if _CERTAIN.search(text):
        return True
    return bool(_AMBIGUOUS.search(text)) and free_bytes is not None and _is_scarce(free_bytes)


def _is_scarce(free_bytes: Callable[[], int]) -> bool:
    try:
        return free_bytes() < _SCARCE_BYTES
    except RuntimeError:  # a broken device answers nothing: the first error tells more
        return False
