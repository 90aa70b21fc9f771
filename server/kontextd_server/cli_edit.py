"""`kontextd edit`: one photo, one instruction, one or more pictures. Knows files and terminals, not torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_models import Acceleration, Done, EditRequest, LoraWeight, ResolutionMode, Step, load_engine

from kontextd_server.picture_files import UsageError, save, targets
from kontextd_server.progress import Progress
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.engine import Engine
    from kontextd_models.folder import ModelFolder

    from kontextd_server.fetch.roots import LoraRoots

_DEFAULTS = {row.name: row.default for row in fields(EditRequest)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `edit`; their defaults are those of `EditRequest`."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file")
    parser.add_argument("prompt", metavar="PROMPT", help='what to do, for example "make it black and white"')
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help=".png or .jpg; default: NAME.edited.png")
    parser.add_argument("--seed", type=int, help="default: a random one, printed with the result")
    parser.add_argument("--steps", type=int, default=_DEFAULTS["num_inference_steps"], help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=_DEFAULTS["guidance_scale"], help="default: %(default)s")
    parser.add_argument(
        "--resolution",
        choices=[mode.value for mode in ResolutionMode],
        default=ResolutionMode.MATCH_INPUT.value,
        metavar="MODE",
        help="match_input (default), auto, or a ratio: "
        + ", ".join(mode.value for mode in ResolutionMode if ":" in mode),
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="1 to 4, with the seeds SEED, SEED+1, …")
    parser.add_argument(
        "--acceleration", choices=[name.value for name in Acceleration], default=Acceleration.NONE.value
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="a file, or ROOT:path of a LoRA root such as library:NAME; may be given several times",
    )
    parser.add_argument("--no-safety", action="store_true", help="do not check the result")
    parser.add_argument("--preview", type=Path, metavar="DIR", help="write a small preview of each step there")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Everything that can be wrong with the command is looked at before the weights are loaded."""
    from kontextd_models.embedded import embedded_model_dir
    from kontextd_models.folder import check_folder
    from kontextd_models.intake import IntakeLimits, open_image
    from kontextd_models.request import check, check_num_images

    check_num_images(arguments.num_images)  # before that many paths are made
    loras = parse_loras(arguments.lora, settings)
    if not arguments.image.is_file():
        raise UsageError(f"{arguments.image} is no file; check the path.")
    paths = targets(arguments.image, arguments.out, arguments.num_images)
    if arguments.preview:
        check_can_be_folder(arguments.preview, "--preview")
    folder = check_folder(settings.model or embedded_model_dir())
    card = folder.card
    request = EditRequest(
        image=open_image(arguments.image, IntakeLimits.for_model(card.limits)),
        prompt=arguments.prompt,
        num_inference_steps=arguments.steps,
        seed=arguments.seed,
        guidance_scale=arguments.guidance,
        num_images=arguments.num_images,
        resolution_mode=ResolutionMode(arguments.resolution),
        loras=loras,
        acceleration=Acceleration(arguments.acceleration),
        enable_safety_checker=not arguments.no_safety,
        preview_interval=1 if arguments.preview else 0,
    )
    check(request, card.limits, settings.lora_limits())
    check_loras(loras, folder, settings)
    progress = Progress(None if arguments.json else sys.stderr)
    try:
        progress.announce(f"loading {card.name}")
        engine = load_engine(settings.engine_config())
        done = drive(engine, request, progress, arguments.preview)
    finally:
        progress.close()
    for image, path in zip(done.images, paths, strict=True):
        save(image, path)
    return report(done, paths, engine, as_json=arguments.json)


def drive(engine: Engine, request: EditRequest, progress: Progress, previews: Path | None) -> Done:
    """Run the edit to its end. Ctrl-C closes the iterator, which leaves the engine as if nothing had happened."""
    with closing(engine.edit(request)) as events:
        for event in events:
            if isinstance(event, Done):
                return event
            progress.show(event)
            if previews and event.preview is not None:
                previews.mkdir(parents=True, exist_ok=True)  # now, so that an edit that is refused leaves none behind
                save(event.preview, previews / preview_name(event, request))
    raise AssertionError("Engine.edit ended without Done")


def preview_name(step: Step, request: EditRequest) -> str:
    """Steps count on over all images of a request; names count within each."""
    steps = step.total // request.num_images
    name = f"step-{step.index - step.image_index * steps:02}.png"
    return name if request.num_images == 1 else f"image-{step.image_index}-{name}"


def parse_loras(texts: Sequence[str], settings: Settings) -> tuple[LoraWeight, ...]:
    """By `parse_lora`, with the roots of this box."""
    if not texts:
        return ()
    from kontextd_server import parts

    roots = parts.lora_roots(settings)
    return tuple(parse_lora(text, roots) for text in texts)


def parse_lora(text: str, roots: LoraRoots) -> LoraWeight:
    """`PATH` or `PATH:SCALE`; a colon that no number follows belongs to the path. Raises `UsageError`."""
    path, colon, tail = text.rpartition(":")
    scale = _number(tail) if colon and not os.path.exists(text) else None
    if scale is None:
        return LoraWeight(_lora_file(text, roots), 1.0, text)
    return LoraWeight(_lora_file(path, roots), scale, path)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _lora_file(text: str, roots: LoraRoots) -> Path:
    """A file of this machine, or what a request of a server would call it."""
    from kontextd_server.fetch.errors import FetchError

    if os.path.isfile(text):  # where the name is too long for a file too, which Path.is_file raises
        return Path(text)
    try:
        found = roots.find(text)
    except FetchError as error:
        raise UsageError(f"--lora {error}") from error
    if found is None:
        raise UsageError(f"--lora {text}: there is no such file; give PATH or PATH:SCALE.")
    return found.path


def check_loras(loras: Sequence[LoraWeight], folder: ModelFolder, settings: Settings) -> None:
    """Raises `UsageError` for a file that the model cannot use, and `LoraFileError`."""
    from kontextd_models.lora.inspection import inspect
    from kontextd_models.lora.layout import layout_of_folder

    layout = layout_of_folder(folder) if loras else {}
    for lora in loras:
        found = inspect(lora.path, layout, settings.lora_limits(), lora.name)
        if found.problem:
            raise UsageError(f"--lora {found.problem}")


def check_can_be_folder(path: Path, option: str) -> None:
    """Raises `UsageError` where an option names what is no folder and cannot become one. Makes nothing."""
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written" if nearest.is_dir() else "is a file"
        raise UsageError(f"{option} {path} cannot be made a folder: {nearest} {what}; name another.")


def report(done: Done, paths: Sequence[Path], engine: Engine, *, as_json: bool) -> int:
    """Where the pictures lie and what they took, on stdout; for people, or as one JSON object.

    The engine logs its warnings itself; only the JSON object repeats them.
    """
    if as_json:
        print(json.dumps(summary(done, paths, engine), indent=2))
        return 0
    card = engine.model.card
    if card.demonstration:
        print(f"{card.name}: it knows only the instructions that `kontextd info` lists.", file=sys.stderr)
    for path, seed, flagged, image in zip(paths, done.seeds, done.has_nsfw_concepts, done.images, strict=True):
        note = "  flagged by the safety checker: the picture is black" if flagged else ""
        print(f"{path}  {image.width}x{image.height}  seed {seed}{note}")
    for lora in done.loras:
        dialects = ", ".join(lora.dialects)
        print(f"{lora.name}  scale {lora.scale:g}  {dialects}  {lora.matched} of {lora.total} tensors used")
    if done.preset.name is not Acceleration.NONE:
        use = done.preset
        print(f"preset {use.name.value}  {use.full} steps in full  {use.cached} cached  {use.skipped} skipped")
    print("  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in done.timings.items() if seconds))
    return 0


def summary(done: Done, paths: Sequence[Path], engine: Engine) -> dict[str, object]:
    """The machine-readable result."""
    from kontextd_models.description import describe

    rows = zip(paths, done.seeds, done.has_nsfw_concepts, strict=True)
    return {
        "images": [{"path": str(path), "seed": seed, "has_nsfw_concepts": flagged} for path, seed, flagged in rows],
        "size": asdict(done.size),
        "timings": dict(done.timings),
        "cache_hits": dict(done.cache_hits),
        "preset": asdict(done.preset),
        "loras": [asdict(lora) for lora in done.loras],
        "warnings": list(done.warnings),
        "model": describe(engine.model),
    }
