"""GPU ops of kontextd: for each op a reference and a Triton kernel. Knows tensors only. Empty so far."""
