"""`kontextd lora`: look LoRA files over, and keep some on this box under names. Knows the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_action
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_models.lora.inspection import Inspection

    from kontextd_server.lora_library import KeptLora, LoraLibrary

_UNFIT = 1  # the exit code of an inspection of what the model cannot use
_NAMED = 10  # tensors without a place, in the text


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = add_action(actions, "inspect", "what a file is, and how much of it the model can use", "model")
    inspect.add_argument("file", type=Path, metavar="FILE")
    add = add_action(actions, "add", "keep a copy of a file in the library, for requests to name", "data", "model")
    add.add_argument("file", type=Path, metavar="FILE")
    add.add_argument("--name", metavar="NAME", help="default: the file's own, without .safetensors")
    remove = add_action(actions, "remove", "take a file out of the library", "data")
    remove.add_argument("name", metavar="NAME")
    add_action(actions, "list", "all that is in the library", "data")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_models.errors import LoraError

    from kontextd_server import parts
    from kontextd_server.lora_library import LibraryError

    library = parts.lora_library(settings)
    try:
        match arguments.action:
            case "inspect":
                return _inspect(arguments, settings)
            case "add":
                found, model = _found(arguments.file, settings)
                _show([library.add(arguments.file, found, model, arguments.name)], arguments)
                _warn(found, model)
            case "remove":
                _remove(library, arguments)
            case "list":
                _show(library.files(), arguments)
    except (LibraryError, LoraError) as error:
        raise UsageError(str(error)) from error
    return 0


def _found(file: Path, settings: Settings) -> tuple[Inspection, str]:
    """What is known of a file, its values among that, and the name of the model that it was held against."""
    from kontextd_models.embedded import embedded_model_dir
    from kontextd_models.errors import LoraError
    from kontextd_models.folder import check_folder
    from kontextd_models.lora.inspection import inspect
    from kontextd_models.lora.layout import layout_of_folder
    from kontextd_models.lora.reading import read_adapter

    if not file.is_file():
        raise UsageError(f"{file} is no file; check the path.")
    folder = check_folder(settings.model or embedded_model_dir())
    layout, limits = layout_of_folder(folder), settings.lora_limits()
    found = inspect(file, layout, limits, str(file))
    if not found.problem:
        try:
            read_adapter(file, layout, limits, str(file))
        except LoraError as error:
            found = replace(found, problem=str(error))
    return found, folder.card.name


def _inspect(arguments: argparse.Namespace, settings: Settings) -> int:
    found, model = _found(arguments.file, settings)
    if arguments.json:
        print(json.dumps({**asdict(found), "model": model}, indent=2))
    else:
        for name, text in _rows(found, model):
            print(f"{name:10} {text}".rstrip())
    return _UNFIT if found.problem else 0


def _rows(found: Inspection, model: str) -> Iterator[tuple[str, str]]:
    coverage, said = found.coverage, found.description
    yield "file", found.name
    yield "sha256", found.sha256
    yield "size", f"{found.size_bytes:,} bytes, {_counted(found.dtypes)}"
    yield "dialect", ", ".join(coverage.dialects) or f"none of FLUX{_looks_like(found)}"
    if found.forms:
        dora = f", {found.dora_count} with DoRA's magnitudes" if found.dora_count else ""
        yield "form", f"{_counted(found.forms)}{dora}; changes {_counted(found.modules)}"
    if found.ranks is not None:
        low, high = found.ranks.lowest, found.ranks.highest
        spread = "" if low == high else f", from {low} to {high}"
        alphas = f"; alpha {', '.join(f'{alpha:g}' for alpha in found.alphas)}" if found.alphas else ""
        yield "rank", f"{found.ranks.most_common}{spread}{alphas}"
    yield "coverage", f"{coverage.matched} of {coverage.total} tensors have a place in {model}"
    if coverage.unmatched:
        yield "unused", _listed(coverage.unmatched)
    yield "triggers", ", ".join(said.trigger_words) or "none named"
    for name, text in (("title", said.title), ("base", said.base_model), ("trainer", said.trainer)):
        if text:
            yield name, text
    if said.tags:
        yield "tags", ", ".join(said.tags)
    yield "usable", f"no: {found.problem}" if found.problem else "yes"


def _warn(found: Inspection, model: str) -> None:
    unmatched = found.coverage.unmatched
    if unmatched:
        print(f"{model} has no place for {len(unmatched)} of its tensors: {_listed(unmatched)}", file=sys.stderr)


def _remove(library: LoraLibrary, arguments: argparse.Namespace) -> None:
    if not library.remove(arguments.name):
        raise UsageError(f"the library has no {arguments.name!r}; see kontextd lora list.")
    if arguments.json:
        print(json.dumps({"name": arguments.name, "status": "removed"}))
    print(f"removed {arguments.name}", file=sys.stderr)


def _show(kept: Sequence[KeptLora], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(
            json.dumps([{"path": one.path, **asdict(one), "added_at": _time(one.added_at)} for one in kept], indent=2)
        )
    elif kept:
        print(_table(kept))


def _table(kept: Sequence[KeptLora]) -> str:
    width = max(len(one.path) for one in kept)
    lines = [f"{'path':{width}}  {'dialect':12}  {'rank':>4}  {'MiB':>7}  {'coverage':>11}  trigger words"]
    for one in kept:
        rank, coverage = "-" if one.rank is None else str(one.rank), f"{one.matched}/{one.total}"
        lines.append(
            f"{one.path:{width}}  {', '.join(one.dialects)[:12]:12}  {rank:>4}  {one.size_bytes / 2**20:>7.1f}  "
            f"{coverage:>11}  {', '.join(one.trigger_words)}".rstrip()
        )
    return "\n".join(lines)


def _looks_like(found: Inspection) -> str:
    return f"; it looks like {found.looks_like}" if found.looks_like else ""


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
