"""The pieces of `benchmarks/gpu.py`: what is measured, how, and how it is told."""
