"""The Triton kernel of qk_norm_rope compiled for GPUs that are not here: `make test-kernels`. Runs nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: make test-kernels does both", allow_module_level=True)

import compiling
from compiling import ADA, HOPPER, REGISTERS, CompiledKernel, accesses, resources
from kontextd_kernels.qk_norm_rope.kernel import norm_rotate_kernel
from kontextd_kernels.qk_norm_rope.triton_way import LARGEST_BLOCK_HEADS, NUM_WARPS

pytestmark = pytest.mark.usefixtures("empty_cache")
TOKENS_AT_ONCE = 8
WIDTH = 128


def compiled(
    heads: str, weights: str, *, width: int = WIDTH, capability: int = HOPPER, divisor: int = 16
) -> CompiledKernel:
    tensors = dict.fromkeys(("text", "image", "out"), f"*{heads}") | {"cosine": "*fp32", "sine": "*fp32"}
    tensors |= dict.fromkeys(("text_weight", "image_weight"), f"*{weights}")
    constants = {"eps": 1e-6, "block_heads": LARGEST_BLOCK_HEADS, "block_width": width}
    given = norm_rotate_kernel, tensors, constants, {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return compiling.compiled(*given, capability=capability, divisor=divisor, unaligned=["text_tokens", "heads"])


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_on_hopper_the_heads_of_a_token_stay_in_registers_and_leave_room_for_other_tokens(
    weights: str, tmp_path: Path
) -> None:
    registers, stack = resources(compiled("bf16", weights), tmp_path)
    assert stack == 0
    assert TOKENS_AT_ONCE * registers * 32 * NUM_WARPS <= REGISTERS


@pytest.mark.parametrize(("heads", "wide"), [("bf16", 4), ("fp32", 8)])
def test_heads_are_read_and_written_once_in_accesses_of_16_bytes_and_angles_once_for_all_heads(
    heads: str, wide: int
) -> None:
    """Each thread has 32 numbers of heads, once of text and once of image in the code, and one of each table."""
    found = accesses(compiled(heads, "bf16"))
    assert found == {"ld v4.b32": 2 * wide, "st v4.b32": wide, "ld b16": 2, "ld b32": 2}


def test_heads_that_are_not_aligned_are_read_one_by_one() -> None:
    assert not {"ld v4.b32", "st v4.b32"} & set(accesses(compiled("bf16", "bf16", divisor=1)))


@pytest.mark.parametrize("width", [2, 64, 256])
def test_other_widths_compile_and_stay_in_registers(width: int, tmp_path: Path) -> None:
    assert resources(compiled("bf16", "bf16", width=width, divisor=2), tmp_path)[1] == 0


def test_it_compiles_for_an_ada_card_too(tmp_path: Path) -> None:
    assert resources(compiled("bf16", "bf16", capability=ADA), tmp_path)[1] == 0
