"""How long another set of LoRAs takes: our merge against diffusers and peft, and against what the machine allows.

    python benchmarks/lora_switch.py [--size small|full] [--device cuda] [--ranks 16] [--counts 1 3 10] [--repeats 3]

A randomly initialised transformer (small: 283 M parameters; full: FLUX.1's 11.9 B) in bfloat16, with LoRAs for every
linear of its blocks. A switch takes one set off and puts another on. Both ways in turn within one run: diffusers'
`unfuse_lora`, `unload_lora_weights`, `load_lora_weights`, `set_adapters` and `fuse_lora`, and ours. Cold: the files are
read (they are in the system's cache). Warm: they were read before; for diffusers, their tensors are handed over. On a
GPU warm means factors that lie on it, and those in pinned host memory have a row of their own. Hot: the set is on
already. The limit is what the same run measures for copying the weights once and for the products at the
rate of one large product, whichever takes longer. Writes JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from kontextd_models import EngineConfig, LoraWeight
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.encode import Pipeline
from kontextd_models.loading import LoadedModel, load_model, load_pipeline
from kontextd_models.lora.stack import LoraStack
from kontextd_models.probe import gpus
from result_file import RESULTS, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHAPES = {"small": (4, 8, 8), "full": (19, 38, 24)}  # double blocks, single blocks, heads of 128
DTYPE = torch.bfloat16
GEMM_SIDE = 4096


@dataclass(frozen=True)
class Stand:
    """Both ways on the same weights. `sets`: files of two sets of the same size."""

    model: LoadedModel
    stock: Pipeline
    config: EngineConfig


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = EngineConfig(model=build(folder / "model", options.size), device=options.device, dtype="bfloat16")
        model = load_model(config)
        stand = Stand(model, load_pipeline(model.folder, DTYPE).to(model.device), config)
        before = digest(model)
        rows = [
            row(stand, rank, count, options.repeats, lora_files(folder, stand, rank, 2 * count))
            for rank in options.ranks
            for count in options.counts
        ]
        with torch.no_grad():
            LoraStack(model, config).merge(())
        drift = {"ours: weights that differ from the base": changed(before, digest(model)), "stock": stock_drift(stand)}
    parameters = sum(value.numel() for value in model.pipeline.transformer.parameters())
    report = {
        "device": [str(each) for each in gpus()] if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "rows": rows,
        "drift": drift,
    }
    path = options.out / f"lora_switch-{options.size}-{model.device.type}.json"
    write(path, report)
    print(f"{table(rows)}\n{drift}\nwritten: {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def build(folder: Path, size: str) -> Path:
    """The demonstration model with a larger, random transformer in its place."""
    embedded = embedded_model_dir()
    folder.mkdir(parents=True)
    for part in embedded.iterdir():
        if part.name not in ("transformer", "checksums.json"):
            (folder / part.name).symlink_to(part)
    double, single, heads = SHAPES[size]
    text_width = json.loads((embedded / "transformer" / "config.json").read_text())["joint_attention_dim"]
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    transformer: Any = FluxTransformer2DModel(  # Any: diffusers' mixins hide that it is a module
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=heads,
        joint_attention_dim=text_width, pooled_projection_dim=text_width, guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    return folder


def lora_files(folder: Path, stand: Stand, rank: int, count: int) -> list[Path]:
    """LoRAs for every linear of the blocks, as diffusers saves them."""
    linears = {
        name: module.weight.shape
        for name, module in stand.stock.transformer.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"blocks\.\d", name)
    }
    files = []
    for index in range(count):
        path = folder / f"r{rank}-{index}.safetensors"
        files.append(path)
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, (rows, columns) in linears.items():
            tensors[f"transformer.{name}.lora_A.weight"] = _random((rank, columns), generator)
            tensors[f"transformer.{name}.lora_B.weight"] = _random((rows, rank), generator)
        save_file(tensors, path)
    return files


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return (0.02 * torch.randn(shape, generator=generator)).to(DTYPE)


def row(stand: Stand, rank: int, count: int, repeats: int, files: Sequence[Path]) -> Mapping[str, object]:
    """Medians in seconds over `repeats` rounds, each of which does every way once."""
    sets = (files[:count], files[count:])
    loaded = {path: load_file(path) for path in files}
    warm, extra = LoraStack(stand.model, stand.config), PeakMemory(stand.model.device)
    merge_files(warm, sets[0])
    merge_files(warm, sets[1])
    on_host = LoraStack(stand.model, replace(stand.config, lora_device_cache_bytes=0))
    for one in sets:
        merge_files(on_host, one)
    merge_files(warm, sets[1])
    with extra:
        merge_files(warm, sets[0])
    stock_on(stand.stock, [(path.stem, path) for path in sets[0]])
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats):
        one, other = sets[(turn + 1) % 2], sets[turn % 2]
        ways: dict[str, Callable[[], object]] = {
            "ours, warm": partial(merge_files, warm, one),
            "ours, hot": partial(merge_files, warm, one),
            "ours, cold": partial(merge_cold, stand, other),
            "ours, warm in host memory": partial(merge_files, on_host, one),
            "stock, warm": partial(stock_switch, stand.stock, [(path.stem, loaded[path]) for path in one]),
            "stock, cold": partial(stock_switch, stand.stock, [(path.stem, path) for path in other]),
        }
        for way, switch in ways.items():
            seconds.setdefault(way, []).append(timed(switch, stand.model.device))
        stock_switch(stand.stock, [(path.stem, loaded[path]) for path in one])
    stock_off(stand.stock)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    limit = limit_s(stand, rank * count, sum(path.stat().st_size for path in sets[0]))
    found = {
        "rank": rank,
        "LoRAs": count,
        "seconds": medians,
        "stock / ours, warm": medians["stock, warm"] / medians["ours, warm"],
        "stock / ours, cold": medians["stock, cold"] / medians["ours, cold"],
        "limit_s": limit,
        "ours, warm / limit": medians["ours, warm"] / max(limit["memory"], limit["products"]),
        "extra memory, MiB": extra.mib,
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def merge_files(stack: LoraStack, files: Sequence[Path]) -> None:
    stack.merge([LoraWeight(path, 0.8) for path in files])


def merge_cold(stand: Stand, files: Sequence[Path]) -> None:
    """By an engine that has read none of them."""
    merge_files(LoraStack(stand.model, stand.config), files)


def stock_switch(pipeline: Pipeline, sources: Sequence[tuple[str, Any]]) -> None:
    stock_off(pipeline)
    stock_on(pipeline, sources)


def stock_off(pipeline: Pipeline) -> None:
    pipeline.unfuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def stock_on(pipeline: Pipeline, sources: Sequence[tuple[str, Any]]) -> None:
    """A source is a file or the tensors of one."""
    for name, source in sources:
        pipeline.load_lora_weights(dict(source) if isinstance(source, Mapping) else source, adapter_name=name)
    pipeline.set_adapters([name for name, _ in sources], [0.8] * len(sources))
    pipeline.fuse_lora(components=["transformer"])


def timed(work: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    work()
    return now() - began


def limit_s(stand: Stand, ranks: int, factor_bytes: int) -> dict[str, float]:
    """Seconds to copy the weights of the blocks and read the factors; for the products; to bring the factors there."""
    weights = [
        module.weight.detach()
        for name, module in stand.stock.transformer.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"blocks\.\d", name)
    ]
    elements, device = sum(weight.numel() for weight in weights), stand.model.device
    copies = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for target, weight in zip(copies, weights, strict=True):
            target.copy_(weight)

    copying = min(timed(copy, device) for _ in range(3))
    product = product_s(device, DTYPE)
    if device.type == "cpu":  # strengths make one factor fp32: a product of fp32, or two of bfloat16
        product = min(product_s(device, torch.float32), 2 * product)
    moved = 2 * elements * DTYPE.itemsize
    factors = torch.empty(factor_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    upload = min(timed(lambda: factors.to(device, copy=True), device) for _ in range(3))
    return {
        "memory": copying * (moved + factor_bytes) / moved,
        "products": 2 * ranks * elements * product / (2 * GEMM_SIDE**3),
        "upload": upload,
    }


def product_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of two square matrices."""
    left, right = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device, dtype=dtype) for _ in range(2))
    return min(timed(lambda: left @ right, device) for _ in range(3))


class PeakMemory:
    """How far the peak of the process, or of the GPU's allocator, rises inside over what was there before."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.mib = device, 0.0

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now
            self._before = _status_bytes("VmRSS")

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status_bytes("VmHWM")
        self.mib = (peak - self._before) / 2**20


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def digest(model: LoadedModel) -> dict[str, int]:
    """A sum over the bits of each weight."""
    return {
        name: int(value.detach().view(torch.int16).to(torch.int64).mul(31).add(7).cumsum(-1).sum())
        for name, value in model.pipeline.transformer.named_parameters()
    }


def changed(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    return sum(before[name] != after[name] for name in before)


def stock_drift(stand: Stand) -> dict[str, float]:
    """After the same number of switches and `unload_lora_weights`: how far the stock pipeline is from the base."""
    merged = dict(stand.model.pipeline.transformer.named_parameters())  # the base again
    pairs = [(merged[name].float(), value.float()) for name, value in stand.stock.transformer.named_parameters()]
    off = sum(float((one - other).square().sum()) for one, other in pairs)
    whole = sum(float(one.square().sum()) for one, _ in pairs)
    share = sum(int((one != other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)
    return {"relative": (off / whole) ** 0.5, "share of weights that differ": share}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| rank | LoRAs | ours cold / warm / hot, s | stock cold / warm, s "
        "| stock / ours cold | warm | limit, s | ours warm / limit | extra MiB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in rows:
        seconds = one["seconds"]
        yield (
            f"| {one['rank']} | {one['LoRAs']} "
            f"| {seconds['ours, cold']:.3f} / {seconds['ours, warm']:.3f} / {seconds['ours, hot']:.4f} "
            f"| {seconds['stock, cold']:.2f} / {seconds['stock, warm']:.2f} "
            f"| {one['stock / ours, cold']:.1f} | {one['stock / ours, warm']:.1f} "
            f"| {max(one['limit_s']['memory'], one['limit_s']['products']):.3f} | {one['ours, warm / limit']:.2f} "
            f"| {one['extra memory, MiB']:.0f} |"
        )


if __name__ == "__main__":
    main()
