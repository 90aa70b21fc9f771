"""What others have published for FLUX.1 Kontext [dev], 28 steps, 1 MP, on one GPU of the H100's class. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    name: str
    seconds: float
    source: str


_REGION_E = "RegionE (Chen et al. 2025), arXiv:2510.25590"
PUBLISHED = (
    Published("diffusers, bf16, eager", 14.68, f"{_REGION_E}, its baseline"),
    Published("TeaCache", 6.20, f"{_REGION_E}, measured there"),
    Published("RegionE, bf16, eager", 6.10, _REGION_E),
    Published(
        "flux-fast, fp8", 5.9, '14.68 s / 2.5: github.com/huggingface/flux-fast says "~2.5x speedup" and no seconds'
    ),
)
