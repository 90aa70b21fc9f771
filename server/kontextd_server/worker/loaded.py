"""What a worker needs of an engine, and the one way to the real one. Never imports torch: `load_engine` does.

Anything of the door's shape serves, which is how tests and benchmarks put an engine in that takes no time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kontextd_models import Done, EditRequest, EngineConfig, Step, load_engine
from kontextd_models.acceleration.table import row_as_json
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.fingerprint import native_size, photo_at
from kontextd_models.intake import IntakeLimits
from kontextd_models.probe import gpus

from kontextd_server.worker.version import model_version, weights_hash

if TYPE_CHECKING:
    from kontextd_models.engine import Engine

log = logging.getLogger(__name__)

_WARM_UP_PROMPT = "make it black and white"


class EngineDoor(Protocol):
    """The engine's door: see `kontextd_models.engine.Engine.edit`."""

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]: ...


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what its worker says of it. `warm_up` is an edit that leaves nothing for the first caller to wait
    for; `notes` tell of fallbacks, which may become more while it runs."""

    engine: EngineDoor
    device: str
    version: str
    warm_up: EditRequest
    intake: IntakeLimits = field(default_factory=IntakeLimits)
    notes: Callable[[], Sequence[str]] = tuple

    @property
    def told_device(self) -> str:
        """The device and every fallback, for /health."""
        return "; ".join((self.device, *self.notes()))


def load_kontext(config: EngineConfig, sums: Path | None = None) -> LoadedEngine:
    """Load the model of a configuration. Raises what `kontextd_models.load_engine` raises.

    `sums`: see `version.weights_hash`, which runs while the model loads.
    """
    hashing = _Hashing(config.model or embedded_model_dir(), sums)
    engine = load_engine(config)
    device_class = _device_class(engine)
    presets = {name.value: row_as_json(row) for name, row in engine.presets.rows.items()}
    return LoadedEngine(
        engine=engine,
        device=device_class,
        version=model_version(hashing.result(), device_class, presets),
        warm_up=_short_edit(engine),
        intake=IntakeLimits.for_model(engine.model.limits),
        notes=lambda: engine.model.notes,
    )


def warm_up(loaded: LoadedEngine) -> None:
    """Make the short edit, and so prove that the engine can make one. Raises whatever it fails with."""
    with closing(loaded.engine.edit(loaded.warm_up)) as events:
        for event in events:
            if isinstance(event, Done):
                log.info("warmed up in %.1f s on %s", event.timings.get("total", 0.0), loaded.device)


class _Hashing:
    """The hash of the weights, made in a thread of its own."""

    def __init__(self, folder: Path, sums: Path | None) -> None:
        self._folder, self._sums = folder, sums
        self._hash = ""
        self._thread = threading.Thread(target=self._run, name="model-hash", daemon=True)
        self._thread.start()

    def result(self) -> str:
        self._thread.join()
        return self._hash

    def _run(self) -> None:
        try:
            self._hash = weights_hash(self._folder, self._sums)
        except OSError as error:  # the loader meets the same, and says which file
            log.warning("the weights cannot be hashed, so the version leaves them out: %s", error)


def _short_edit(engine: Engine) -> EditRequest:
    """At the native size and with the checker and a preview, so that nothing of them is new to the first caller."""
    return EditRequest(
        image=photo_at(native_size(engine, 1.5)), prompt=_WARM_UP_PROMPT, num_inference_steps=1, preview_interval=1
    )


def _device_class(engine: Engine) -> str:
    """Such as "NVIDIA H100 80GB HBM3 (9.0), bfloat16", or "cpu, float32"."""
    device, numerics = engine.model.device, engine.model.numerics
    if device.type != "cuda":
        return f"{device.type}, {numerics}"
    gpu = gpus()[device.index or 0]
    return f"{gpu['name']} ({gpu['capability']}), {numerics}"
