"""Errors of torch and CUDA's libraries in their own words: which of them say that memory ran out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kontextd_models.out_of_memory import is_out_of_memory
from torch._dynamo.exc import BackendCompilerFailed

FULL, ROOMY = 100 * 2**20, 40 * 2**30
CUBLAS_CREATE = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"


def room(free_bytes: int) -> Callable[[], int]:
    return lambda: free_bytes


def never_asked() -> int:
    raise AssertionError("the error says it by itself")


def allocation(size_bytes: int) -> RuntimeError:
    """What torch raises here and now for more host memory than there is."""
    try:
        torch.empty(size_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError(f"{size_bytes} bytes were to be had")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        MemoryError(),
        RuntimeError(CUBLAS_CREATE.format("ALLOC_FAILED")),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, ... )`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED\n[1, 16, 64, 64]"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        BackendCompilerFailed(compile, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), None),
        allocation(2**50),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:50]}",
)
def test_an_error_that_says_so_is_one_whatever_is_free(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert is_out_of_memory(error, never_asked)


@pytest.mark.parametrize(
    "text",
    [
        CUBLAS_CREATE.format("NOT_INITIALIZED"),
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    ],
)
def test_what_a_broken_device_answers_too_is_one_only_where_next_to_nothing_is_free(text: str) -> None:
    def broken() -> int:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    error = RuntimeError(text)
    assert is_out_of_memory(error, room(FULL))
    assert not is_out_of_memory(error, room(ROOMY))
    assert not is_out_of_memory(error, broken)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, ...)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, ...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        BackendCompilerFailed(compile, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        ValueError("CUBLAS_STATUS_ALLOC_FAILED"),  # somebody else's words
    ],
)
def test_any_other_error_is_none_even_on_a_full_device(error: BaseException) -> None:
    assert not is_out_of_memory(error, room(FULL))
