"""The Triton kernel of modulated_norm compiled for GPUs that are not here: `make test-kernels`. Runs nothing."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: make test-kernels does both", allow_module_level=True)

import compiling
from compiling import ADA, HOPPER, REGISTERS, CompiledKernel, accesses, resources
from kontextd_kernels.modulated_norm.kernel import norm_kernel
from kontextd_kernels.modulated_norm.launch import WIDEST
from kontextd_kernels.modulated_norm.triton_way import block_of, warps

pytestmark = pytest.mark.usefixtures("empty_cache")
ROWS_AT_ONCE = 6
SUM_BYTES = 4  # of a warp, to add up and to find the largest: more means that values change threads
MODEL = 4096  # the block for D = 3072
is_gated = pytest.mark.parametrize("is_gated", [False, True], ids=["norm", "gated"])
fp8 = pytest.mark.parametrize("fp8", [False, True], ids=["rounded", "fp8"])


def compiled(
    is_gated: bool,
    fp8: bool,
    block: int,
    channels: str = "bf16",
    *,
    capability: int = HOPPER,
    divisor: int = 16,
    ones: tuple[str, ...] = (),
) -> CompiledKernel:
    """Sizes that are 1 are constants to Triton."""
    rows, channels = "*bf16", f"*{channels}"
    tensors = {"x": rows, "scale": channels, "shift": channels, "normed": "*fp8e4nv" if fp8 else rows, "eps": "fp32"}
    if is_gated:
        tensors |= {"update": rows, "gate": channels, "tokens": rows}
    if fp8:
        tensors["row_scale"] = "*fp32"
    constants: dict[str, object] = {"largest_code": 448.0, "least_scale": 2.0**-126, "block": block}
    constants |= dict.fromkeys({"update", "gate", "tokens", "row_scale"} - set(tensors)) | dict.fromkeys(ones, 1)
    options = {"num_warps": warps(block), "enable_fp_fusion": True}
    given = norm_kernel, tensors, constants, options
    return compiling.compiled(*given, capability=capability, divisor=divisor, unaligned=["eps", "row_scale_row"])


@is_gated
@fp8
@pytest.mark.parametrize("channels", ["bf16", "fp32"])
def test_on_hopper_a_row_of_the_model_stays_in_registers_of_its_threads_and_leaves_room_for_others(
    is_gated: bool, fp8: bool, channels: str, tmp_path: Path
) -> None:
    made = compiled(is_gated, fp8, MODEL, channels)
    registers, stack = resources(made, tmp_path)
    assert stack == 0
    assert ROWS_AT_ONCE * registers * 32 * warps(MODEL) <= REGISTERS
    assert made.metadata.shared == SUM_BYTES * warps(MODEL)


@is_gated
@fp8
@pytest.mark.parametrize(("channels", "wide"), [("bf16", 4), ("fp32", 8)])
def test_every_value_is_read_and_written_once_in_accesses_of_16_bytes_and_8_codes(
    is_gated: bool, fp8: bool, channels: str, wide: int
) -> None:
    """Each thread has 32 values, four times 16 bytes of bf16. The first value of a row is read by itself as well."""
    found = accesses(compiled(is_gated, fp8, MODEL, channels))
    expected = {"ld v4.b32": 8 + 3 * wide if is_gated else 4 + 2 * wide, "st v4.b32": 4 * (is_gated + (not fp8))}
    narrow = [found.pop(name) for name in ("ld b16", "ld b32") if name in found]
    assert sum(narrow) == (3 if is_gated else 1)
    assert found == Counter(expected | ({"st v2.b32": 4, "st b32": 1} if fp8 else {}))


def test_rows_that_are_not_aligned_are_read_one_by_one() -> None:
    assert not {"ld v4.b32", "st v4.b32"} & set(accesses(compiled(False, False, MODEL, divisor=1)))


@is_gated
@fp8
def test_any_width_has_a_block_that_compiles_and_keeps_a_row_in_registers(
    is_gated: bool, fp8: bool, tmp_path: Path
) -> None:
    widths = {1: 8, 8: 8, 9: 16, 192: 256, 3072: MODEL, WIDEST: WIDEST}
    assert {width: block_of(width) for width in widths} == widths
    stacks = [resources(compiled(is_gated, fp8, block, divisor=1), tmp_path)[1] for block in set(widths.values())]
    assert max(stacks) == 0


@is_gated
@fp8
def test_rows_of_one_value_compile(is_gated: bool, fp8: bool) -> None:
    ones = ("width", "x_row", "update_row", "tokens_row", "normed_row", "row_scale_row")
    assert compiled(is_gated, fp8, block_of(1), ones=ones).asm["ptx"]


@is_gated
@fp8
def test_it_compiles_for_an_ada_card_too(is_gated: bool, fp8: bool, tmp_path: Path) -> None:
    assert resources(compiled(is_gated, fp8, MODEL, capability=ADA), tmp_path)[1] == 0
