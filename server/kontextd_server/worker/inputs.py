"""A request's inputs, brought onto this box and opened. Knows where each stands in the request; knows no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kontextd_models import LoraWeight
from kontextd_models.errors import KontextdError
from kontextd_models.intake import Intake, IntakeLimits, open_image

from kontextd_server.fetch import Fetched, Purpose
from kontextd_server.fetch.download import Progress
from kontextd_server.fetch.urls import without_query
from kontextd_server.wire.errors import Loc
from kontextd_server.wire.schema import FluxKontextLoraInput
from kontextd_server.wire.schema import LoraWeight as WireLora
from kontextd_server.worker.stages import Stage, StageWatch


class Inputs(Protocol):
    """Where inputs come from: `fetch.Fetcher` is one."""

    def fetch(self, reference: str, purpose: Purpose, into: Path, progress: Progress | None = None) -> Fetched:
        """Make the new file `into` what `reference` names. `progress` is called often; what it raises ends it."""


class InputFailed(Exception):
    """An input could not be had; `cause` says why, `loc` where it stands in the request."""

    def __init__(self, loc: Loc, cause: KontextdError) -> None:
        super().__init__(str(cause))
        self.loc, self.cause = loc, cause


@dataclass(frozen=True)
class GatheredLoras:
    """All LoRAs of a request, in its order: the engine tells of them by their place, also where the scale is 0."""

    weights: tuple[LoraWeight, ...] = ()
    size_bytes: int = 0
    fetch_s: float = 0.0


@dataclass(frozen=True)
class Gathered:
    """The inputs of a request, on this box."""

    picture: Intake
    loras: GatheredLoras


def gather(
    inputs: Inputs,
    wanted: FluxKontextLoraInput,
    folder: Path,
    limits: IntakeLimits,
    watch: StageWatch,
    look: Callable[[], None],
) -> Gathered:
    """Fetch everything into `folder` and open the image. Raises `InputFailed`, the image's `InputError`, and what
    `look` raises, which is asked all the time whether to go on."""

    def progress(_bytes: int, _of: int | None) -> None:
        watch.enter(Stage.FETCH)
        look()

    def fetched(reference: str, purpose: Purpose, name: str, loc: Loc) -> Fetched:
        progress(0, None)
        with _standing_at(loc):
            return inputs.fetch(reference, purpose, folder / name, progress)

    picture = fetched(wanted.image_url, Purpose.IMAGE, "image", ("body", "image_url"))
    loras = _gather_loras(wanted.loras, fetched)
    look()
    watch.enter(Stage.OPEN)
    return Gathered(open_image(picture.path, limits), loras)


def _gather_loras(wanted: Sequence[WireLora], fetched: Callable[[str, Purpose, str, Loc], Fetched]) -> GatheredLoras:
    began, weights, size_bytes = time.monotonic(), [], 0
    for place, lora in enumerate(wanted):
        loc: Loc = ("body", "loras", place, "path")
        file = fetched(lora.path, Purpose.LORA, f"lora-{place}.safetensors", loc)
        weights.append(LoraWeight(file.path, lora.scale, without_query(lora.path), file.sha256))
        size_bytes += file.size_bytes
    return GatheredLoras(tuple(weights), size_bytes, time.monotonic() - began)


@contextmanager
def _standing_at(loc: Loc) -> Iterator[None]:
    try:
        yield
    except KontextdError as error:
        raise InputFailed(loc, error) from error
