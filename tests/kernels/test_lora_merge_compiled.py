"""The Triton kernels of lora_merge compiled for GPUs that are not here: `make test-kernels`. Runs nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not part of the default install: make test-kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: make test-kernels does both", allow_module_level=True)

import triton
from kontextd_kernels.lora_merge.kernel import merge_kernel, peak_kernel, quantise_kernel
from kontextd_kernels.lora_merge.triton_way import FEW_RANKS, MANY_RANKS, Blocks
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

FACTORS = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}  # the most that a block may have (CUDA C++ programming guide, table 30)
REGISTERS = 65536  # of a multiprocessor
SPILLED_BYTES = 16  # Triton 3.9 puts four registers of one of these kernels on the stack; 3.6 and 3.7 none


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))


def compiled(kernel: triton.JITFunction, factors: tuple[str, str], tiling: Blocks, capability: int) -> CompiledKernel:
    """As for tensors of which all sizes and strides are multiples of 16: those of the model."""
    tensors = {"base": "*bf16", "out": "*bf16", "peaks": "*fp32", "codes": "*fp8e4nv", "scale": "*fp32"}
    tensors |= {"up": f"*{factors[0]}", "down": f"*{factors[1]}"}
    constants = {"largest_code": 448.0, "least_scale": 2.0**-126, **vars(tiling)}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name != "scale_row"
    }
    options = {name: value for name, value in vars(tiling).items() if name not in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: CompiledKernel, folder: Path) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


@pytest.mark.parametrize(("tiling", "tiles_at_once"), [(FEW_RANKS, 4), (MANY_RANKS, 2)], ids=["few", "many"])
@pytest.mark.parametrize("factors", FACTORS, ids="-".join)
@pytest.mark.parametrize("kernel", [merge_kernel, peak_kernel, quantise_kernel], ids=lambda kernel: kernel.__name__)
def test_on_hopper_it_uses_tensor_cores_and_wide_accesses_and_leaves_room_for_its_neighbours(
    kernel: triton.JITFunction, factors: tuple[str, str], tiling: Blocks, tiles_at_once: int, tmp_path: Path
) -> None:
    made = compiled(kernel, factors, tiling, 90)
    ptx = made.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)) == {"0x10"}
    assert "ld.global.v4.b32" in ptx
    registers, stack = resources(made, tmp_path)
    assert stack <= SPILLED_BYTES
    assert tiles_at_once * registers * 32 * tiling.num_warps <= REGISTERS
    assert tiles_at_once * made.metadata.shared <= SHARED_BYTES[90]


@pytest.mark.parametrize("tiling", [FEW_RANKS, MANY_RANKS], ids=["few", "many"])
@pytest.mark.parametrize("kernel", [merge_kernel, quantise_kernel], ids=lambda kernel: kernel.__name__)
def test_it_fits_into_an_ada_card_too(kernel: triton.JITFunction, tiling: Blocks) -> None:
    assert compiled(kernel, ("fp32", "fp32"), tiling, 89).metadata.shared <= SHARED_BYTES[89]
