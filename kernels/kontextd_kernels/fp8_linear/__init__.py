"""A linear layer in float8, row-wise, and its rows quantised: `launch` is its door. Knows tensors; knows no models."""

from kontextd_kernels.fp8_linear.launch import (
    fp8_linear,
    multiplies_fp8,
    quantised_gelu,
    quantised_linear,
    quantised_rows,
)

__all__ = ["fp8_linear", "multiplies_fp8", "quantised_gelu", "quantised_linear", "quantised_rows"]
