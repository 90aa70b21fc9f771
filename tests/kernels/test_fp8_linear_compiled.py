"""The Triton kernel that quantises rows compiled for GPUs that are not here: `make test-kernels`. Runs nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: make test-kernels does both", allow_module_level=True)

import compiling
from compiling import ADA, HOPPER, REGISTERS, CompiledKernel, accesses, resources
from kontextd_kernels.fp8_linear.kernel import quantise_rows_kernel
from kontextd_kernels.fp8_linear.triton_way import tile

pytestmark = pytest.mark.usefixtures("empty_cache")
ROWS_AT_ONCE = 5
L1_BYTES = 200 << 10  # of the 256 KB that Hopper has for it and shared memory, with room for what is written
SUM_BYTES = 4  # of a warp, to find the largest: more means that values change threads
WIDEST = 3072 + 12288  # of the model, in bf16


def compiled(
    rows: str, columns: int, *, capability: int = HOPPER, divisor: int = 16, ones: tuple[str, ...] = ()
) -> CompiledKernel:
    """Sizes that are 1 are constants to Triton."""
    block, num_warps = tile(columns)
    tensors = {"beside": f"*{rows}", "hidden": f"*{rows}", "codes": "*fp8e4nv", "scale": "*fp32"}
    constants = {"largest_code": 448.0, "least_scale": 2.0**-126, "block": block} | dict.fromkeys(ones, 1)
    given = quantise_rows_kernel, tensors, constants, {"num_warps": num_warps, "enable_fp_fusion": True}
    return compiling.compiled(*given, capability=capability, divisor=divisor, unaligned=["scale_row"])


@pytest.mark.parametrize("rows", ["bf16", "fp32"])
def test_on_hopper_five_rows_run_at_a_time_and_stay_in_the_l1_cache(rows: str, tmp_path: Path) -> None:
    made = compiled(rows, WIDEST)
    registers, stack = resources(made, tmp_path)
    at_once = REGISTERS // (registers * 32 * tile(WIDEST)[1])
    assert stack == 0
    assert at_once >= ROWS_AT_ONCE
    assert at_once * WIDEST * 2 <= L1_BYTES
    assert made.metadata.shared == SUM_BYTES * tile(WIDEST)[1]


@pytest.mark.parametrize(("rows", "wide"), [("bf16", 2), ("fp32", 4)])
def test_values_are_read_in_accesses_of_16_bytes_and_16_codes_are_written_at_once_by_the_gpu_s_own_rounding(
    rows: str, wide: int
) -> None:
    """Five loops read, each thread 16 values: twice for a peak, once for that of small values, twice for codes."""
    made = compiled(rows, WIDEST)
    assert accesses(made) == {"ld v4.b32": 5 * wide, "st v4.b32": 2, "st b32": 1}
    assert made.asm["ptx"].count("cvt.rn.satfinite.e4m3x2.f32") == 2 * 8


def test_gelu_is_two_special_functions_for_each_value_and_is_computed_in_three_places() -> None:
    """For codes, for the peak of small values, and of one number, the largest: 1 / (1 + exp2)."""
    assert compiled("bf16", WIDEST).asm["ptx"].count("ex2.approx") == 16 + 16 + 1


def test_rows_that_are_not_aligned_are_read_one_by_one() -> None:
    assert not {"ld v4.b32", "st v4.b32"} & set(accesses(compiled("bf16", WIDEST, divisor=1)))


@pytest.mark.parametrize("columns", [1, 130, 768, 3072, 8200])
def test_rows_of_any_width_have_a_tile_that_compiles_and_stays_in_registers(columns: int, tmp_path: Path) -> None:
    assert resources(compiled("fp32", columns, divisor=1), tmp_path)[1] == 0


def test_rows_of_one_value_compile() -> None:
    assert compiled("bf16", 1, ones=("hidden_columns", "hidden_row", "codes_row", "scale_row")).asm["ptx"]


def test_it_compiles_for_an_ada_card_too(tmp_path: Path) -> None:
    assert resources(compiled("bf16", WIDEST, capability=ADA), tmp_path)[1] == 0
