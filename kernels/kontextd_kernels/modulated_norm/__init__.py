"""Norm, scale, shift and gated residual of a block, in one go: `launch` is its door. Knows tensors; knows no models."""

from kontextd_kernels.modulated_norm.launch import gated_norm, gated_norm_fp8, modulated_norm, modulated_norm_fp8

__all__ = ["gated_norm", "gated_norm_fp8", "modulated_norm", "modulated_norm_fp8"]
