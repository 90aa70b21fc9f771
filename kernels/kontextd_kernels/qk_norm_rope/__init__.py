"""Query and key heads normed and rotated in one go: `launch` is its door. Knows tensors; knows no models."""

from kontextd_kernels.qk_norm_rope.launch import normed_rotated, pair_normed_rotated

__all__ = ["normed_rotated", "pair_normed_rotated"]
