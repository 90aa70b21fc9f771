"""Clocks: seconds by stage, and the pace of the loop on a GPU. Knows stages by name; knows no models, no requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("encode_prompt", "encode_image", "merge", "denoise", "decode", "safety")


class StageClock:
    """Seconds by stage. A GPU is waited for where a stage begins and ends, and nowhere else.

    A stage that yields counts what its consumer does meanwhile: the work waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._first: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside to the stage. Not added where it raises: then nobody gets to see it."""
        began = self._now()
        self._first.setdefault(name, began)
        yield
        self._seconds[name] += self._now() - began

    def since_first(self, name: str) -> float:
        """Seconds since the stage began for the first time. Waits for nothing."""
        return time.perf_counter() - self._first[name]

    def seconds(self) -> dict[str, float]:
        """By stage, and "total" since the clock was made."""
        return {**self._seconds, "total": self._now() - self._began}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Pace:
    """Keeps the host at most one step ahead of a GPU.

    Launching a step takes less than running it. Unchecked, the host would report steps that have not run, and a request
    that is given up would leave several of them queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def step(self) -> None:
        """Call after launching a step: returns once the one before it has run."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        if self._last is not None:
            self._last.synchronize()
        self._last = event
