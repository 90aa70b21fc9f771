"""Figures of the engine on this machine: our loop against diffusers' own, stages, memory, first edit, previews.

    python benchmarks/engine.py [--model DIR] [--device cuda] [--repeats 7] [--out FILE]

Ratios are of two ways taken in turn within one run, each the median of `--repeats` pairs: other work on the machine
slows both. Memory and the first edit are measured in processes of their own. Without --model it measures the embedded
demonstration model. Writes JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from kontextd_models import Done, EditRequest, EngineConfig, load_engine
from kontextd_models.description import describe
from kontextd_models.embedded import sample_photo
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import native_size, photo_at
from kontextd_models.probe import gpus, versions
from kontextd_models.stock import StockEdit, stock_picture

STEPS = 30
PROMPT = "make it black and white"
RESULTS = Path(__file__).parent / "results"
CHILD_TIMEOUT_S = 1800


def main() -> None:
    options = parse()
    config = EngineConfig(model=options.model, device=options.device)
    if options.only_memory:
        print(json.dumps(peak_memory(config)))
        return
    engine = load_engine(config)
    figures = {
        "our loop / stock pipeline, cold caches": cold_ratio(engine, options.repeats),
        "our loop / stock pipeline, warm caches": warm_ratio(engine, options.repeats),
        "a preview each step / none": preview_ratio(engine, options.repeats, checked=False),
        "a checked preview each step / none": preview_ratio(engine, options.repeats, checked=True),
        "seconds by stage": stages(engine, options.repeats),
    }
    model = {**describe(engine.model), "folder": engine.model.folder.name}  # a figure tells nobody where things lie
    del engine
    figures["peak memory of a process"] = child_memory(options)
    figures["first edit of a cold process"] = first_edit(options)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "model": model,
        "steps": STEPS,
        "repeats": options.repeats,
        "figures": figures,
    }
    write(report, options.out or RESULTS / f"engine-{'cuda' if gpus() and options.device != 'cpu' else 'cpu'}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def request(engine: Engine, *, preview_interval: int = 0, checked: bool = False) -> EditRequest:
    photo = photo_at(native_size(engine, 1.0))
    return EditRequest(photo, PROMPT, STEPS, seed=1, enable_safety_checker=checked, preview_interval=preview_interval)


def edit(engine: Engine, asked: EditRequest) -> Done:
    *_, done = engine.edit(asked)
    assert isinstance(done, Done)
    return done


def uncached(engine: Engine) -> Engine:
    """The same model behind caches that keep nothing."""
    return Engine(engine.model, replace(EngineConfig(), prompt_cache_bytes=0, reference_cache_bytes=0))


def cold_ratio(engine: Engine, repeats: int) -> Mapping[str, object]:
    """Both encode prompt and reference each time."""
    fresh, asked, same = uncached(engine), request(engine), stock_request(engine)
    return in_turn("ours", lambda: edit(fresh, asked), "stock", lambda: stock_picture(engine.model, same), repeats)


def warm_ratio(engine: Engine, repeats: int) -> Mapping[str, object]:
    """Prompt and reference are those of the edit before; the stock pipeline has no caches and encodes them again."""
    asked, same = request(engine), stock_request(engine)
    edit(engine, asked)
    assert all(edit(engine, asked).cache_hits.values())
    return in_turn("ours", lambda: edit(engine, asked), "stock", lambda: stock_picture(engine.model, same), repeats)


def preview_ratio(engine: Engine, repeats: int, *, checked: bool) -> Mapping[str, object]:
    """Checked previews share the CPU with the loop where there is no GPU; unchecked they cost the projection alone."""
    shown, plain = request(engine, preview_interval=1, checked=checked), request(engine, checked=checked)
    return in_turn("with", lambda: edit(engine, shown), "without", lambda: edit(engine, plain), repeats)


def stock_request(engine: Engine) -> StockEdit:
    """The same edit for the stock pipeline."""
    size = native_size(engine, 1.0)
    return StockEdit(photo_at(size), PROMPT, *size, STEPS, request(engine).guidance_scale, seed=1)


def in_turn(
    name: str, way: Callable[[], object], other: str, other_way: Callable[[], object], repeats: int
) -> Mapping[str, object]:
    """Seconds of both, taken in turn after one of each to warm up, and the median of the ratios of the pairs."""
    way()
    other_way()
    pairs = []
    for turn in range(repeats):
        order = (way, other_way) if turn % 2 == 0 else (other_way, way)  # who goes second finds warmer hardware
        taken = {each: seconds(each) for each in order}
        pairs.append((taken[way], taken[other_way]))
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": [a / b for a, b in pairs],
        f"{name}_s": statistics.median(a for a, _ in pairs),
        f"{other}_s": statistics.median(b for _, b in pairs),
    }


def seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def stages(engine: Engine, repeats: int) -> Mapping[str, object]:
    """Of an edit with nothing cached and the safety checker on."""
    fresh, asked = uncached(engine), request(engine, checked=True)
    rows = [edit(fresh, asked).timings for _ in range(repeats)]
    return {stage: statistics.median(row[stage] for row in rows) for stage in rows[0]}


def peak_memory(config: EngineConfig) -> Mapping[str, object]:
    """Of this process, after a load and one edit at the native area with the safety checker on."""
    engine = load_engine(config)
    edit(engine, request(engine, checked=True))
    figures: dict[str, object] = {"host_bytes": peak_resident_bytes()}
    if engine.model.device.type == "cuda":
        import torch

        figures["device_bytes"] = torch.cuda.max_memory_allocated(engine.model.device)
    return figures


def peak_resident_bytes() -> int:
    """proc(5), VmHWM. Not `ru_maxrss`: of a child process that begins with the peak of its parent."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found, "the kernel does not tell the peak of this process"
    return int(found[1]) * 1024


def child_memory(options: argparse.Namespace) -> Mapping[str, object]:
    return json.loads(child([sys.executable, __file__, "--only-memory", *model_options(options)])[0])


def first_edit(options: argparse.Namespace) -> Mapping[str, object]:
    """Wall time of `kontextd edit` from start to written file, and the part of it that was the edit itself."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.png")
        command = [
            sys.executable,
            "-m",
            "kontextd_server.cli",
            "edit",
            str(sample_photo()),
            PROMPT,
            "-o",
            out,
            "--json",
        ]
        printed, wall_s = child([*command, *model_options(options)])
    result = json.loads(printed)
    return {
        "wall_s": wall_s,
        "edit_s": result["timings"]["total"],
        "size": [result["size"][s] for s in ("width", "height")],
    }


def model_options(options: argparse.Namespace) -> list[str]:
    chosen = ["--model", str(options.model)] if options.model else []
    return [*chosen, "--device", options.device]


def child(command: list[str]) -> tuple[str, float]:
    """What a process printed, and the seconds it took. A process that fails ends the benchmark."""
    began = time.perf_counter()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CHILD_TIMEOUT_S, check=True)
    return ran.stdout, time.perf_counter() - began


def machine() -> Mapping[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": threads,
        "gpus": gpus(),
    }


def write(report: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figures = report["figures"]
    assert isinstance(figures, Mapping)
    for name, values in figures.items():
        print(f"{name:42} {'  '.join(f'{key} {shown(value)}' for key, value in values.items() if key != 'ratios')}")
    print(f"written: {path}")


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value / 1e6:.0f} MB" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
