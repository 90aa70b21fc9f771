"""What the tests of Triton kernels share: arithmetic as on a GPU in the interpreter, a cache of each test's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path: only this folder knows compiling.py


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.fixture
def true_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates to bf16 and multiplies bf16 by their bits: here it does both as a GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def convert(data: Any, source: tl.dtype, target: tl.dtype, rounding: object) -> Any:
        bits = torch.from_numpy(data.copy()).view(dtypes[source]).to(dtypes[target])
        return bits.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()

    def dot(self: Any, left: Any, right: Any, sums: Any, *_: object) -> Any:
        factors = [torch.from_numpy(each.data.copy()).view(dtypes[each.dtype.scalar]).float() for each in (left, right)]
        return interpreter.TensorHandle((factors[0] @ factors[1]).numpy() + sums.data, tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
