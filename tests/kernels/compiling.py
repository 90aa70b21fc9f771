"""Compiles Triton kernels for GPUs that are not here, and reads what came of it. Knows no kernel."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

HOPPER, ADA = 90, 89
REGISTERS = 65536  # of a multiprocessor


def compiled(
    kernel: triton.JITFunction,
    tensors: Mapping[str, str],
    constants: Mapping[str, object],
    options: Mapping[str, object],
    *,
    capability: int = HOPPER,
    divisor: int = 16,
    unaligned: Collection[str] = (),
) -> CompiledKernel:
    """As for arguments that are multiples of the divisor, addresses, sizes and strides, but for the unaligned ones.

    `tensors` has the type of each argument that is neither a constant nor a 32-bit integer.
    """
    names = kernel.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", divisor]]
        for index, name in enumerate(names)
        if name not in constants and name not in unaligned
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def accesses(kernel: CompiledKernel) -> Counter[str]:
    """How often a thread reads and writes memory, by direction and width."""
    return Counter(
        f"{one} {width}" for one, width in re.findall(r"(ld|st)\.global\.((?:v\d\.)?b\d+)", kernel.asm["ptx"])
    )


def resources(kernel: CompiledKernel, folder: Path) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)
