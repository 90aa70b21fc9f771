"""The version of what a worker runs: same seed, prompt and version, same picture. Knows files; knows no torch.

It is a hash of the weights, of the engine's code, of the rows of its presets, of the libraries that decide its numbers,
and of the kind of device. Sums of weight files are kept beside the data by size and time of change: hashing 34 GB takes
half a minute at best, and is done while the model loads.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from kontextd_models.checksums import model_files, sha256_of
from kontextd_models.probe import versions

from kontextd_server.files.atomic import as_json, make_folder, replace_whole

log = logging.getLogger(__name__)

_CODE = ("kontextd_models", "kontextd_kernels")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")
_DIGITS = 16  # of the hash: enough to tell versions apart, short enough to be read out


def model_version(weights: str, device_class: str, presets: Mapping[str, object]) -> str:
    """`weights` is `weights_hash`; `device_class` says what computes, and in which numbers; `presets` are the rows."""
    libraries = [f"{name} {version}" for name, version in versions().items() if name in _LIBRARIES]
    told = "\n".join((weights, _code_hash(), *libraries, device_class, json.dumps(presets, sort_keys=True)))
    return hashlib.sha256(told.encode()).hexdigest()[:_DIGITS]


def weights_hash(folder: Path, sums: Path | None = None) -> str:
    """Of all files of a model. `sums` keeps their sums from one start to the next; several workers may share it."""
    known = _known(sums)
    found = {f"{folder}/{name.as_posix()}": _Stamped(folder / name) for name in model_files(folder)}
    for path, file in found.items():
        file.take(known.get(path))
    if sums is not None and any(file.is_fresh for file in found.values()):
        _remember(sums, {**known, **{path: file.row() for path, file in found.items()}})
    lines = (f"{path.removeprefix(f'{folder}/')} {file.sha256}" for path, file in found.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Stamped:
    """A file with its size and time of change, by which a kept sum is known to be its own."""

    def __init__(self, path: Path) -> None:
        found = path.stat()
        self._path, self._stamp = path, f"{found.st_size} {found.st_mtime_ns}"
        self.sha256 = ""
        self.is_fresh = False

    def take(self, kept: object) -> None:
        stamp, _, sha256 = str(kept).rpartition(" ")
        self.is_fresh = stamp != self._stamp
        self.sha256 = sha256_of(self._path) if self.is_fresh else sha256

    def row(self) -> str:
        return f"{self._stamp} {self.sha256}"


def _known(sums: Path | None) -> Mapping[str, object]:
    try:
        found = json.loads(sums.read_bytes()) if sums is not None and sums.exists() else {}
    except (OSError, ValueError) as error:
        log.warning("the kept sums in %s cannot be read, so the model is hashed again: %s", sums, error)
        return {}
    return found if isinstance(found, dict) else {}


def _remember(sums: Path, rows: Mapping[str, object]) -> None:
    try:
        make_folder(sums.parent)
        replace_whole(sums, as_json(rows))
    except OSError as error:
        log.warning("the sums of the model cannot be kept, so the next start hashes it again: %s", error)


def _code_hash() -> str:
    sums = hashlib.sha256()
    for path in _sources():
        sums.update(path.name.encode())
        sums.update(path.read_bytes())
    return sums.hexdigest()


def _sources() -> Iterator[Path]:
    """Found without importing them: the kernels are the engine's business."""
    for name in _CODE:
        spec = find_spec(name)
        for folder in spec.submodule_search_locations or () if spec else ():
            yield from sorted(Path(folder).rglob("*.py"))
