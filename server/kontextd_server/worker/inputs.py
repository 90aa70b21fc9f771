"""A request's inputs, brought onto this box and opened. Knows where each stands in the request; knows no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kontextd_models import LoraWeight
from kontextd_models.errors import KontextdError
from kontextd_models.intake import Intake, IntakeLimits, open_image

from kontextd_server.fetch import Fetched, Purpose
from kontextd_server.fetch.download import Progress
from kontextd_server.wire.errors import Loc
from kontextd_server.wire.schema import FluxKontextLoraInput
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
class Gathered:
    """The inputs of a request, on this box."""

    picture: Intake
    loras: tuple[LoraWeight, ...]


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

    def fetched(reference: str, purpose: Purpose, name: str, loc: Loc) -> Path:
        progress(0, None)
        with _standing_at(loc):
            return inputs.fetch(reference, purpose, folder / name, progress).path

    picture_path = fetched(wanted.image_url, Purpose.IMAGE, "image", ("body", "image_url"))
    loras = tuple(
        LoraWeight(fetched(lora.path, Purpose.LORA, f"lora-{n}.safetensors", ("body", "loras", n, "path")), lora.scale)
        for n, lora in enumerate(wanted.loras)
    )
    look()
    watch.enter(Stage.OPEN)
    return Gathered(open_image(picture_path, limits), loras)


@contextmanager
def _standing_at(loc: Loc) -> Iterator[None]:
    try:
        yield
    except KontextdError as error:
        raise InputFailed(loc, error) from error
