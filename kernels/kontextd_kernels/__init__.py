"""GPU ops of kontextd: for each a reference, a Triton kernel and a launcher. Knows tensors only."""
