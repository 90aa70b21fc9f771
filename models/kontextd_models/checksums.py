"""SHA-256 of a model's files, and what they should be. Knows folders and manifests; knows no torch and no network.

What a file should be is looked for in three places, first hit first:

- `checksums.json` beside the model: {"vae/config.json": "<sha256>", …}, written by `kontextd doctor --record`;
- `.cache/huggingface/download/<file>.metadata`, which `hf download --local-dir` leaves: its second line is the ETag,
  and for a file in LFS that is the SHA-256 (huggingface_hub, `_local_folder.py`);
- the hub cache, where a file is a link to `blobs/<ETag>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from kontextd_models.errors import ModelError
from kontextd_models.folder import CARD, PARTS, read_json

MANIFEST = "checksums.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def model_files(folder: Path) -> list[Path]:
    """The files of a pipeline's parts: not what else a repository holds. Sorted, relative to `folder`."""
    found = [path for part in PARTS for path in (folder / part.name).rglob("*") if path.is_file()]
    found += [folder / name for name in ("model_index.json", CARD) if (folder / name).is_file()]
    names = [path.relative_to(folder) for path in found]
    return sorted(name for name in names if not any(piece.startswith(".") for piece in name.parts))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256, for the files whose sum is known from one of the three places."""
    manifest = _manifest(folder)
    found = {}
    for path in model_files(folder):
        name = path.as_posix()
        known = manifest.get(name) or _download_record(folder, name) or _blob_name(folder / path)
        if known:
            found[name] = known
    return {**manifest, **found}


def record(folder: Path) -> dict[str, str]:
    """Hash all files of the model and write the sums beside it, for later runs of `doctor` to compare with."""
    sums = {path.as_posix(): sha256_of(folder / path) for path in model_files(folder)}
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)
    return sums


def _manifest(folder: Path) -> Mapping[str, str]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    sums = read_json(path)
    for name, value in sums.items():
        if not (isinstance(value, str) and _SHA256.fullmatch(value)):
            raise ModelError(f"{path}: the sum of {name} is {value!r}; it must be 64 hex digits. Record it again.")
    return {name: str(value) for name, value in sums.items()}


def _download_record(folder: Path, name: str) -> str | None:
    path = folder / ".cache/huggingface/download" / f"{name}.metadata"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None


def _blob_name(path: Path) -> str | None:
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and _SHA256.fullmatch(target.name) else None
