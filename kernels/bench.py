"""Measure every op of the table on the shapes of the model, against the limit of this device.

    python kernels/bench.py [--device cpu] [--repeats 15] [--only TEXT] [--sweep] [--out FILE]

The limit of a case is max(bytes / bandwidth, FLOPs / GEMM rate): bytes and FLOPs the least the op can do, both rates
measured in the same run, on a copy (bytes read and written) and a square product: on a GPU of bf16, on a CPU of fp32 or
of bf16 twice, as a factor in fp32 takes it, whichever is faster. Every run starts with cold caches, and times are
medians. An op that has a rival in torch's compiler is measured beside it, `compiled_s`, where there is a C++ compiler.
`--sweep` tries more tilings of lora_merge on a GPU. Writes JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

import torch
from kontextd_kernels.lora_merge import merged
from kontextd_kernels.op import Case, Op
from kontextd_kernels.ops import OPS

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
Row = dict[str, float | int | str]


def main() -> None:
    options = parse()
    bench = Bench(torch.device(options.device), options.repeats)
    print(f"{bench.name}: {bench.bytes_s / 1e9:.1f} GB/s, {bench.flops_s / 1e12:.3f} TFLOP/s", flush=True)
    chosen = [
        (op, case) for op in OPS for case in op.ours[bench.device.type] if options.only in f"{op.name} {case.name}"
    ]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "kernels/bench.py", *sys.argv[1:]]),
        "device": bench.name,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "repeats": options.repeats,
        "bytes_s": bench.bytes_s,
        "flops_s": bench.flops_s,
        "rows": [shown(bench.row(op, case)) for op, case in chosen],
        "sweep": [shown(row) for row in bench.sweep(chosen)] if options.sweep else [],
    }
    out = options.out or RESULTS / f"kernels-{re.sub('[^a-z0-9]+', '-', bench.name.lower())}.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose line in the table contains this text")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.sweep and options.device == "cpu":
        parser.error("--sweep tries tilings of the Triton kernels, which need a GPU; leave it out here")
    return options


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown(row: Row) -> Row:
    figures = f"{row['seconds'] * 1e3:9.3f} ms  {row['of_limit']:6.2f} x limit"
    rest = [f"{name} {value:.3g}" if isinstance(value, float) else str(value) for name, value in list(row.items())[6:]]
    print(f"{row['op']:19} {row['case']:46} {figures}  {'  '.join(rest)}", flush=True)
    return row


class Bench:
    """A device, and how fast it copies and multiplies."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.on_gpu = device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self.on_gpu else "cpu"
        # More than any cache holds.
        self._flushed = torch.empty((512 if self.on_gpu else 128) << 20, dtype=torch.uint8, device=device)
        self.bytes_s = self._bandwidth((4 << 30) if self.on_gpu else (256 << 20))
        self.flops_s = self._gemm_rate(8192, torch.bfloat16) if self.on_gpu else self._rate_of_cpu(2048)

    def row(self, op: Op, case: Case) -> Row:
        """One case: the launcher, into memory that is there already where it can, its rivals, and its error."""
        inputs = case.inputs(self.device)
        result = op.launcher(*inputs)
        results = result if isinstance(result, tuple) else (result,)
        memory = results if op.takes_memory else ()
        row = self._figures(op, case, self.seconds(lambda: op.launcher(*inputs, *memory)))
        row["reference_s"] = self.seconds(lambda: op.reference(*inputs))
        if op.has_compiled_rival and shutil.which(os.environ.get("CXX", "g++")):
            torch.compiler.reset()  # compiled for this shape alone, whatever was before
            compiled = torch.compile(op.reference, dynamic=False, fullgraph=True)
            row["compiled_s"] = self.seconds(lambda: compiled(*inputs))
        return row | {"error_of_allowed": op.excess(inputs, result)}

    def sweep(self, chosen: Sequence[tuple[Op, Case]]) -> Iterator[Row]:
        """lora_merge in many tilings; a name says which: out x in x ranks, warps, stages."""
        from kontextd_kernels.lora_merge.triton_way import MANY_RANKS, merge

        tiles = product((64, 128), (64, 128, 256), (16, 32), (4, 8), (2, 3, 4))
        for (op, case), (out, columns, ranks, warps, stages) in product(chosen, tiles):
            if op.launcher is not merged:
                continue
            tiling = replace(MANY_RANKS, block_out=out, block_in=columns, block_rank=ranks, num_warps=warps)
            tiling = replace(tiling, num_stages=stages, maxnreg=128 if warps == 8 else 255)
            inputs = case.inputs(self.device)
            result = torch.empty_like(inputs[0])
            taken = self.seconds(partial(merge, *inputs, result, tiling))
            yield self._figures(op, case, taken) | {"tiling": f"{out}x{columns}x{ranks} {warps} {stages}"}

    def seconds(self, way: Callable[[], object]) -> float:
        """The median over the repeats, each with cold caches, after two to warm up."""
        way()
        way()
        return statistics.median(self._one(way) for _ in range(self.repeats))

    def _figures(self, op: Op, case: Case, seconds: float) -> Row:
        limit_s = max(case.size_bytes / self.bytes_s, case.flops / self.flops_s)
        figures = {"bytes": case.size_bytes, "flops": case.flops, "seconds": seconds, "of_limit": seconds / limit_s}
        return {"op": op.name, "case": case.name, **figures}

    def _one(self, way: Callable[[], object]) -> float:
        self._flushed.zero_()
        if not self.on_gpu:
            start_s = time.perf_counter()
            way()
            return time.perf_counter() - start_s
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _bandwidth(self, size_bytes: int) -> float:
        source = torch.empty(size_bytes // 4, device=self.device).normal_()
        target = torch.empty_like(source)
        return 2 * size_bytes / self.seconds(lambda: target.copy_(source))

    def _rate_of_cpu(self, side: int) -> float:
        return max(self._gemm_rate(side, torch.float32), self._gemm_rate(side, torch.bfloat16) / 2)

    def _gemm_rate(self, side: int, dtype: torch.dtype) -> float:
        left, right = (torch.empty(side, side, device=self.device, dtype=dtype).normal_() for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: left @ right)


if __name__ == "__main__":
    main()
