"""A process that measures parts, one after the other, and sends each result. Knows stands and works; logs to a file."""

from __future__ import annotations

import logging
import platform
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from kontextd_models.probe import gpus, versions

from gpu_parts import edits, others, ours
from gpu_parts.clocks import compiled_graphs, matmul_tflops, now
from gpu_parts.parts import LOG_FILE, Options, Part, Work
from gpu_parts.stand import Stand

_WORKS = {
    Work.STOCK: edits.stock,
    Work.EDIT: edits.edit,
    Work.SIZES: others.sizes,
    Work.TRACE: others.trace,
    Work.STAGES: others.stages,
}


def work(results: Connection, options: Options, parts: Sequence[Part]) -> None:
    """Send the result of the start, then one for each part; end early where the device is of no more use."""
    logging.basicConfig(filename=options.out / LOG_FILE, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        stand, started = _start(options, parts[0])
    except Exception:
        results.send({"error": traceback.format_exc(), "ends_process": True})
        return
    results.send(started)
    for part in parts:
        result = _measured(stand, part)
        results.send(result)
        if result.get("ends_process"):
            return


def _start(options: Options, first: Part) -> tuple[Stand, dict[str, Any]]:
    device = torch.device(options.device)
    machine = {
        "device": gpus()[device.index or 0] if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {**versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "matmul_tflops": matmul_tflops(device, *_product(options, device)),
    }
    began = now(device)
    stand = Stand(options)
    machine["parameters"] = sum(weight.numel() for weight in stand.model.pipeline.transformer.parameters())
    machine["weights_s"] = now(device) - began
    if first.work not in (Work.STOCK, Work.STAGES):
        stand.run_in(first.precision)
        machine["execution"] = ours.told(stand.model)
        machine["graphs"] = compiled_graphs()
    return stand, machine


def _product(options: Options, device: torch.device) -> tuple[torch.dtype, int]:
    """Of which the rate is measured."""
    return (torch.bfloat16 if device.type == "cuda" else torch.float32), 256 if options.tiny else 8192


def _measured(stand: Stand, part: Part) -> dict[str, Any]:
    try:
        return {"figures": _WORKS[part.work](stand, part)}
    except Exception:
        error = traceback.format_exc()
    try:
        now(stand.device)
    except Exception:  # an error of CUDA stays with its process
        return {"error": error, "ends_process": True}
    return {"error": error}
