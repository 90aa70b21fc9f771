"""The Triton kernels of lora_merge compiled for GPUs that are not here: `make test-kernels`. Runs nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: make test-kernels does both", allow_module_level=True)

import compiling
import triton
from compiling import ADA, HOPPER, REGISTERS, CompiledKernel, resources
from kontextd_kernels.lora_merge.kernel import merge_kernel, peak_kernel, quantise_kernel
from kontextd_kernels.lora_merge.triton_way import FEW_RANKS, MANY_RANKS, Blocks

pytestmark = pytest.mark.usefixtures("empty_cache")
FACTORS = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
SHARED_BYTES = {
    ADA: 99 << 10,
    HOPPER: 227 << 10,
}  # of a block at most (CUDA C++ programming guide, table 30)
SPILLED_BYTES = 16  # Triton 3.9 puts four registers of one of these kernels on the stack; 3.6 and 3.7 none


def compiled(kernel: triton.JITFunction, factors: tuple[str, str], tiling: Blocks, capability: int) -> CompiledKernel:
    tensors = {"base": "*bf16", "out": "*bf16", "peaks": "*fp32", "codes": "*fp8e4nv", "scale": "*fp32"}
    tensors |= {"up": f"*{factors[0]}", "down": f"*{factors[1]}"}
    constants = {"largest_code": 448.0, "least_scale": 2.0**-126, **vars(tiling)}
    options = {name: value for name, value in vars(tiling).items() if name not in kernel.arg_names}
    return compiling.compiled(kernel, tensors, constants, options, capability=capability, unaligned=["scale_row"])


@pytest.mark.parametrize(("tiling", "tiles_at_once"), [(FEW_RANKS, 4), (MANY_RANKS, 2)], ids=["few", "many"])
@pytest.mark.parametrize("factors", FACTORS, ids="-".join)
@pytest.mark.parametrize("kernel", [merge_kernel, peak_kernel, quantise_kernel], ids=lambda kernel: kernel.__name__)
def test_on_hopper_it_uses_tensor_cores_and_wide_accesses_and_leaves_room_for_its_neighbours(
    kernel: triton.JITFunction, factors: tuple[str, str], tiling: Blocks, tiles_at_once: int, tmp_path: Path
) -> None:
    made = compiled(kernel, factors, tiling, HOPPER)
    ptx = made.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)) == {"0x10"}
    assert "ld.global.v4.b32" in ptx
    registers, stack = resources(made, tmp_path)
    assert stack <= SPILLED_BYTES
    assert tiles_at_once * registers * 32 * tiling.num_warps <= REGISTERS
    assert tiles_at_once * made.metadata.shared <= SHARED_BYTES[HOPPER]


@pytest.mark.parametrize("tiling", [FEW_RANKS, MANY_RANKS], ids=["few", "many"])
@pytest.mark.parametrize("kernel", [merge_kernel, quantise_kernel], ids=lambda kernel: kernel.__name__)
def test_it_fits_into_an_ada_card_too(kernel: triton.JITFunction, tiling: Blocks) -> None:
    assert compiled(kernel, ("fp32", "fp32"), tiling, ADA).metadata.shared <= SHARED_BYTES[ADA]
