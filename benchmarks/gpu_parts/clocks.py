"""Seconds, bytes and graphs. Knows devices; knows no models."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Marks:
    """Points in time, taken without waiting for the device, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._points: list[Any] = []  # Any: events of CUDA, or seconds

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = zip(self._points, self._points[1:], strict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def now(device: torch.device) -> float:
    """Once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = now(device)
    work()
    return now(device) - began


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now


def peak_bytes(device: torch.device) -> int:
    """Of tensors on a GPU; on the CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def compiled_graphs() -> int:
    """How many graphs Dynamo has made in this process so far; one that is made again counts again."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def matmul_tflops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """The rate of one large square product, the best of five: what a card reaches, beside what it is sold for."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(5))
    return 2 * side**3 / best / 1e12
