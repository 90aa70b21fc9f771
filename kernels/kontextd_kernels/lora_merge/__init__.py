"""Low-rank LoRAs merged into one weight, in one go: `launch` is its door. Knows tensors; knows no files or models."""

from kontextd_kernels.lora_merge.launch import merged, merged_fp8

__all__ = ["merged", "merged_fp8"]
