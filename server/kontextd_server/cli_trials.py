"""What `kontextd bench` and `kontextd calibrate` share: the edits they make, and the words for them. Knows no torch."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_models import EditRequest, EngineConfig

from kontextd_server.cli_edit import check_loras, parse_loras
from kontextd_server.picture_files import UsageError
from kontextd_server.report.figures import counted
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.folder import ModelFolder
    from kontextd_models.limits import ModelLimits
    from kontextd_models.trials.cases import Case, Size
    from kontextd_models.trials.running import Manner, Runner

_DEFAULTS = {row.name: row.default for row in fields(EditRequest)}
_SEED = 7


@dataclass(frozen=True)
class Subject:
    """What is edited, and how."""

    folder: ModelFolder
    cases: Sequence[Case]
    manner: Manner


def add_trial_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a photo, or a folder of photos; may be given several times. Default: a photo in the package",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times. Default: the instructions that the model names",
    )
    parser.add_argument(
        "--lora",
        action="append",
        nargs="+",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRAs that are merged together, beside the edits without any; may be given several times",
    )
    parser.add_argument("--steps", type=int, default=_DEFAULTS["num_inference_steps"], help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=_DEFAULTS["guidance_scale"], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=_SEED, help="of every edit; default: %(default)s")
    parser.add_argument("--no-safety", action="store_true", help="do not check the results")


def subject_of(arguments: argparse.Namespace, settings: Settings, sizes: Sequence[Size] = ()) -> Subject:
    """Everything that can be wrong with the command is looked at before the weights are loaded.

    Raises `UsageError`, `InputError` and `ModelError`.
    """
    from kontextd_models.embedded import embedded_model_dir, sample_photo
    from kontextd_models.folder import check_folder
    from kontextd_models.trials.cases import LoraSet, cases, photos
    from kontextd_models.trials.running import Manner

    sets = [LoraSet(parse_loras(texts, settings)) for texts in arguments.lora]
    folder = check_folder(settings.model or embedded_model_dir())
    check_loras([lora for one in sets for lora in one.loras], folder, settings)
    for path in arguments.image:
        if not path.exists():
            raise UsageError(f"--image {path} is no file and no folder; check the path.")
    limits = _limits(folder, settings.max_area)
    found = cases(
        photos(arguments.image or [sample_photo()], limits),
        _prompts(arguments.prompt, folder),
        [LoraSet(), *sets],
        limits,
        sizes,
    )
    manner = Manner(arguments.steps, arguments.guidance, arguments.seed, not arguments.no_safety)
    by_prompt, by_loras = {case.prompt: case for case in found}, {case.loras: case for case in found}
    for case in (*by_prompt.values(), *by_loras.values()):
        _check(case, manner, folder, settings)
    return Subject(folder, found, manner)


@contextmanager
def quiet_engine() -> Iterator[None]:
    """Its warnings are the same with each of many edits; a report tells each of them once."""
    log = logging.getLogger("kontextd_models.engine")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def kept_whatever_fails(report: Callable[[], object]) -> Iterator[None]:
    """Where the block fails, report what is known by then; its error goes on, also where the report fails in turn."""
    try:
        yield
    except BaseException:
        try:
            report()
        except Exception as error:  # such as a full disk: what ended the block matters more
            told(f"what was measured could not be written: {error}", quiet=False)
        raise


def told(text: str, *, quiet: bool) -> None:
    """What goes on, for people who wait."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def header(runner: Runner) -> dict[str, object]:
    """What every report begins with: when, by which command, with what, on what."""
    from kontextd_models.probe import versions
    from kontextd_models.trials.running import machine

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["kontextd", *sys.argv[1:]]),
        "versions": versions(),
        "machine": machine(runner.engine),
        "steps": runner.manner.steps,
        "guidance_scale": runner.manner.guidance_scale,
        "seed": runner.manner.seed,
        "safety_checker": runner.manner.is_checked,
        "warnings": list(runner.warnings),
    }


def facts_of(head: Mapping[str, object], cases: Sequence[Case]) -> dict[str, str]:
    """The same for people, with what was edited."""
    machine = head["machine"]
    assert isinstance(machine, dict)
    model, versions = machine["model"], head["versions"]
    assert isinstance(model, dict)
    assert isinstance(versions, dict)
    kind = {"kind": "a demonstration: its figures say nothing of FLUX"} if model["demonstration"] else {}
    cpu = f", {machine['threads']} threads of {machine['cores']} cores" if model["device"] == "cpu" else ""
    return {
        "model": str(model["name"]),
        **kind,
        "folder": str(model["folder"]),
        "device": f"{machine['device_name']}{cpu}, {model['memory_mode']}",
        "precision": f"{model['precision']}, {model['dtype']}, {'compiled' if model['compiled'] else 'not compiled'}",
        "photos": ", ".join(dict.fromkeys(case.photo for case in cases)),
        "prompts": ", ".join(dict.fromkeys(case.prompt for case in cases)),
        "LoRAs": ", ".join(dict.fromkeys(case.loras.name for case in cases)),
        "edits": f"{counted(int(str(head['steps'])), 'step')}, guidance {head['guidance_scale']}, seed {head['seed']}",
        "date": str(head["date"]),
        "command": str(head["command"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def encoding_anew(config: EngineConfig) -> EngineConfig:
    """So that each edit takes what one with a new photo and a new prompt takes."""
    return replace(config, prompt_cache_bytes=0, reference_cache_bytes=0)


def _prompts(given: Sequence[str], folder: ModelFolder) -> Sequence[str]:
    if given or folder.card.instructions:
        return list(dict.fromkeys(given or folder.card.instructions))
    raise UsageError(f"{folder.card.name} names no instructions of its own; give --prompt TEXT, once or more.")


def _limits(folder: ModelFolder, max_area: int | None) -> ModelLimits:
    try:
        return folder.card.limits if max_area is None else replace(folder.card.limits, max_area=max_area)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check(case: Case, manner: Manner, folder: ModelFolder, settings: Settings) -> None:
    from kontextd_models.request import check

    request = EditRequest(
        case.image, case.prompt, manner.steps, manner.seed, manner.guidance_scale, loras=case.loras.loras
    )
    check(request, folder.card.limits, settings.lora_limits())
