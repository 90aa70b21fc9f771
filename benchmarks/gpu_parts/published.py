"""What others have published for FLUX.1 Kontext [dev], 28 steps, 1 MP, on one GPU of the H100's class. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Other:
    """Seconds that the authors of `source` measured and published.

    With a `derivation` they are worked out here from what `source` says, and nobody has measured them.
    """

    name: str
    seconds: float
    source: str
    derivation: str = ""

    @property
    def kind(self) -> str:
        return f"derived: {self.derivation}" if self.derivation else "published"


_REGION_E = "RegionE (Chen et al. 2025), arXiv:2510.25590"
OTHERS = (
    Other("diffusers, bf16, eager", 14.68, f"{_REGION_E}, its baseline"),
    Other("TeaCache", 6.20, f"{_REGION_E}, measured there"),
    Other("RegionE, bf16, eager", 6.10, _REGION_E),
    Other(
        "flux-fast, fp8",
        14.68 / 2.5,
        'RegionE\'s baseline / the "~2.5x speedup" that github.com/huggingface/flux-fast claims over its own baseline',
        derivation="14.68 / 2.5",
    ),
)
