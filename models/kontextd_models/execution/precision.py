"""Which layers of the transformer run in float8. Knows them by name; knows no tensors and no devices.

`KEPT_FULL` was settled by what each part costs in likeness to full precision on the embedded model (docs/decisions.md).
Modulation is one vector a step, so that nothing is gained by it; the last single block costs most, and is 1/57 of
FLUX.1's products.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# How the names of layers that stay in full precision end or begin; {last} is the index of the last single block.
KEPT_FULL = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "single_transformer_blocks.{last}.")
_IN_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.")


def fp8_layers(linears: Iterable[str]) -> tuple[str, ...]:
    """Of the names of a transformer's linear layers, those that run in float8, in order."""
    inside = [(name, found) for name in linears if (found := _IN_BLOCK.match(name))]
    singles = [int(found[2]) for _, found in inside if found[1].startswith("single")]
    kept = tuple(part.format(last=max(singles, default=-1)) for part in KEPT_FULL)
    return tuple(name for name, _ in inside if not name.endswith(kept) and not name.startswith(kept))
