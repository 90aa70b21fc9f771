"""Is this machine fit to run this model? Each check looks at one thing and names the remedy. Loads no weights.

Torch runs only in the process of `probe`. Nothing here opens a connection: off-lineness is judged by what the
imports of the engine tried, and by what the environment says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kontextd_models import EngineConfig, memory
from kontextd_models.acceleration.table import presets_of
from kontextd_models.checks import Check
from kontextd_models.checksums import MANIFEST, expected, model_files, sha256_of
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.errors import KontextdError, ModelError
from kontextd_models.execution.planning import Device, choose_precision, reuses_reference
from kontextd_models.folder import ModelFolder, check_folder
from kontextd_models.safety.gate import EMBEDDED
from kontextd_models.safety.open_nsfw import SHA256, read_weights, weights_file

_GIB = 2**30
_PROBE_TIMEOUT_S = 180  # importing torch from a cold disk takes up to a minute
_SMI_TIMEOUT_S = 20
_DISK_NEEDED = 1 * _GIB  # for results and temporary files
_MEMORY_MARGIN = 1.15  # weights, and activations with the libraries on top
# First Linux driver of each CUDA family (CUDA release notes, table of driver versions).
_FIRST_DRIVER = {"12": "525.60.13", "13": "580.65.06"}
_ONLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")


@dataclass(frozen=True)
class Patient:
    """What is looked at. `environment` is handed in, so that nothing here depends on where it runs."""

    config: EngineConfig
    work_dir: Path  # where results are written
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.config.model or embedded_model_dir()


def examine(patient: Patient) -> Iterator[Check]:
    """All checks, each as soon as it is made: hashing the weights takes the longest."""
    yield check_disk(patient)
    probed, report = check_torch()
    yield probed
    yield check_gpu(patient, report)
    complete, folder = check_model(patient)
    yield complete
    yield check_memory(patient, folder, report)
    yield check_offline(patient, report)
    yield check_safety_model(patient)
    if folder is not None:
        yield check_hashes(folder)


def check_model(patient: Patient) -> tuple[Check, ModelFolder | None]:
    """The folder is a whole FLUX.1 Kontext: parts, classes, headers, lengths."""
    try:
        folder = check_folder(patient.folder)
    except ModelError as error:
        return Check("model", False, str(error)), None
    elements = parameters(folder)
    figures = {"folder": str(folder.path), "parameters": elements}
    kind = f"{sum(elements.values()) / 1e6:,.1f} M parameters"
    demonstration = ", a demonstration model" if folder.card.demonstration else ""
    return Check("model", True, f"{folder.card.name}{demonstration}: {kind}, complete", figures), folder


def check_hashes(model: ModelFolder) -> Check:
    """Every file of the model against the sum it should have."""
    folder = model.path
    try:
        wanted = expected(folder)
        found = {path.as_posix(): sha256_of(folder / path) for path in model_files(folder)}
    except (ModelError, OSError) as error:
        return Check("hashes", False, f"{error}")
    missing = sorted(wanted.keys() - found.keys())
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    figures = {"sha256": found, "known": len(wanted), "wrong": wrong, "missing": missing}
    if wrong or missing:
        what = [f"{name} differs" for name in wrong] + [f"{name} is missing" for name in missing]
        return Check("hashes", False, f"{folder}: {', '.join(what)}. Copy these files again.", figures)
    if not wanted:
        remedy = f"no {MANIFEST}, so nothing to compare with; `kontextd doctor --record` writes one"
        return Check("hashes", None, f"{len(found)} files hashed; {remedy}", figures)
    return Check("hashes", True, f"{len(wanted)} of {len(found)} files have the sums they should", figures)


def check_safety_model(patient: Patient) -> Check:
    """The weights of the embedded classifier by their hash, and that folders of other checkers are there."""
    checkers = patient.config.safety.checkers
    figures: dict[str, object] = {"checkers": checkers}
    absent = [name for name in checkers if name != EMBEDDED and not (Path(name) / "config.json").is_file()]
    if absent or not checkers:
        what = f"{absent[0]} is no checker's folder" if absent else "no checker is set"
        return Check("safety", False, f"{what}; name {EMBEDDED!r}, or a folder with a config.json", figures)
    if EMBEDDED not in checkers:
        return Check("safety", None, f"{', '.join(checkers)}: folders, whose sums are not known", figures)
    try:
        read_weights(weights_file())
    except ModelError as error:
        return Check("safety", False, str(error), figures)
    return Check("safety", True, f"{', '.join(checkers)}: weights whole, sha256 {SHA256[:12]}…", figures)


def check_disk(patient: Patient) -> Check:
    """Room for results, and whether they can be written at all."""
    free = shutil.disk_usage(patient.work_dir).free
    figures = {"folder": str(patient.work_dir), "free_bytes": free}
    if not os.access(patient.work_dir, os.W_OK):
        return Check(
            "disk", False, f"{patient.work_dir} cannot be written; start elsewhere or change its rights", figures
        )
    if free < _DISK_NEEDED:
        remedy = f"free at least {_DISK_NEEDED / _GIB:.0f} GiB"
        return Check("disk", False, f"{free / _GIB:.1f} GiB free in {patient.work_dir}; {remedy}", figures)
    return Check("disk", True, f"{free / _GIB:.1f} GiB free in {patient.work_dir}", figures)


def check_torch() -> tuple[Check, Mapping[str, object] | None]:
    """Whether the engine imports, in a process of its own; what that process found is handed on."""
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "kontextd_models.probe"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        remedy = "The GPU driver may hang: look at dmesg, then restart the machine."
        return Check("torch", False, f"importing the engine took over {_PROBE_TIMEOUT_S} s. {remedy}"), None
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "Install kontextd again with its constraints.txt."
        return Check("torch", False, f"the engine cannot be imported: {last}. {remedy}"), None
    report = json.loads(ran.stdout.splitlines()[-1])
    versions = report["versions"]
    detail = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "transformers"))
    return Check("torch", True, detail, {"versions": versions, "cuda_build": report["cuda_build"]}), report


def check_gpu(patient: Patient, report: Mapping[str, object] | None) -> Check:
    """What the driver sees against what torch sees, and what the settings ask for."""
    cards, complaint = nvidia_smi()
    seen = _rows(report, "gpus")
    figures = {"driver_sees": cards, "torch_sees": seen, "nvidia_smi": complaint}
    wanted = patient.config.device
    if seen and wanted.startswith("cuda") and _card(wanted, seen) is None:
        return Check("gpu", False, f"the device is set to {wanted} and torch sees {len(seen)}; set it to auto", figures)
    if seen:
        names = ", ".join(
            f"{row['name']} ({_gib(row['free_bytes'])} of {_gib(row['total_bytes'])} free)" for row in seen
        )
        return Check("gpu", True, names, figures)
    if cards:
        return Check("gpu", False, _why_unseen(cards, report), figures)
    if wanted.startswith("cuda"):
        why = complaint or "there is no NVIDIA GPU"
        return Check("gpu", False, f"the device is set to {wanted} and {why}; set it to auto", figures)
    if complaint and wanted != "cpu":
        return Check("gpu", False, f"{complaint}. Repair the driver, or set the device to cpu", figures)
    return Check("gpu", None, f"{complaint or 'no NVIDIA GPU'}: edits run on the CPU", figures)


def check_memory(patient: Patient, folder: ModelFolder | None, report: Mapping[str, object] | None) -> Check:
    """Free memory of the host against what loading this model needs there."""
    available = available_memory()
    if available is None:
        return Check("memory", None, "/proc/meminfo is not there, so free memory is unknown")
    if folder is None:
        return Check("memory", None, f"{_gib(available)} free; there is no whole model to compare with")
    card = _card(patient.config.device, _rows(report, "gpus"))
    on_gpu, config = card is not None, patient.config
    in_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu)
    area = config.max_area or folder.card.limits.max_area
    try:
        presets = presets_of(folder.path, config.presets)
        fp8, _ = choose_precision(config, presets, Device(_capability(card), in_bfloat16))
    except KontextdError as error:
        return Check("memory", False, str(error))
    keeps = reuses_reference(presets.rows.values())
    sizes = memory.sizes_of(folder, 2 if in_bfloat16 else 4, area, fp8=fp8, keeps_reference=keeps)
    mode, _ = memory.choose(card["free_bytes"] if card else 0, sizes, on_gpu, config.memory_mode)
    needed = int(memory.host_needs(sizes, mode, on_gpu) * _MEMORY_MARGIN)
    figures = {"available_bytes": available, "needed_bytes": needed, "memory_mode": mode}
    detail = f"{_gib(available)} free, {_gib(needed)} needed in the memory mode {mode}"
    if available < needed:
        return Check("memory", False, f"{detail}; close other programs, or use a machine with more memory", figures)
    return Check("memory", True, detail, figures)


def check_offline(patient: Patient, report: Mapping[str, object] | None) -> Check:
    """No import of the engine reached for the network, and nothing in the environment tells a library to."""
    switches = {name: patient.environment[name] for name in _ONLINE_SWITCHES if name in patient.environment}
    attempts = list(_rows(report, "network_attempts"))
    figures = {"switches": switches, "attempts": attempts}
    if attempts:
        return Check("offline", False, f"importing the engine tried {attempts[0]}; report this as a bug", figures)
    on = [name for name, value in switches.items() if value.lower() in {"0", "false", "no", "off"}]
    if on:
        return Check("offline", False, f"{', '.join(on)} is switched off; unset it or set it to 1", figures)
    told = ", ".join(f"{name}={value}" for name, value in switches.items()) or "no variable needed"
    if report is None:
        return Check("offline", None, f"the engine was not imported, so its attempts are unknown ({told})", figures)
    return Check("offline", True, f"no import reaches for the network, models load from folders only ({told})", figures)


def parameters(folder: ModelFolder) -> dict[str, int]:
    """Number of parameters by part."""
    return {part: sum(info.elements for info in tensors.values()) for part, tensors in folder.tensors.items()}


def nvidia_smi() -> tuple[list[dict[str, str]], str]:
    """One row for each card the driver sees, and what is wrong with the driver; both empty where there is none."""
    columns = ("name", "driver_version", "memory.total", "memory.free")
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    command = [program, f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {_SMI_TIMEOUT_S} s"
    if ran.returncode:
        said = " ".join((ran.stdout + ran.stderr).split())[:200].rstrip(".")
        return [], f"nvidia-smi fails: {said or f'exit code {ran.returncode}'}"
    cells = [line.split(", ") for line in ran.stdout.splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in cells if len(row) == len(columns)], ""


def available_memory() -> int | None:
    """Bytes the kernel could give without swapping (proc(5), MemAvailable)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in lines)
    return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None


def _card(device: str, cards: list[Any]) -> Any | None:
    """The row of the card that `device` means; None for the CPU, and for a card that torch does not see."""
    if not device.startswith(("auto", "cuda")):
        return None
    number = device.partition(":")[2] or "0"
    return cards[int(number)] if number.isdigit() and int(number) < len(cards) else None


def _capability(card: Any | None) -> tuple[int, int] | None:
    """Of a row that `probe` printed, such as "9.0"."""
    if card is None:
        return None
    major, _, minor = str(card["capability"]).partition(".")
    return int(major), int(minor)


def _why_unseen(cards: list[dict[str, str]], report: Mapping[str, object] | None) -> str:
    """The driver sees a GPU and torch does not."""
    card = f"the driver ({cards[0]['driver_version']}) sees {cards[0]['name']}, torch does not"
    built_for = (report or {}).get("cuda_build")
    if not isinstance(built_for, str):
        return f"{card}: this torch is built without CUDA. Install kontextd from a wheelhouse made for GPUs"
    first = _FIRST_DRIVER.get(built_for.split(".")[0])
    return f"{card}: it is built for CUDA {built_for}. Install driver {first or 'as its release notes say'} or newer"


# Any: rows of the JSON that `probe` printed; each reader knows the shape of its own.
def _rows(report: Mapping[str, object] | None, key: str) -> list[Any]:
    found = (report or {}).get(key)
    return found if isinstance(found, list) else []


def _gib(size_bytes: object) -> str:
    return f"{size_bytes / _GIB:.1f} GiB" if isinstance(size_bytes, int) else "?"
