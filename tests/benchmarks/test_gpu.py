"""`benchmarks/gpu.py` on a tiny model, with nothing but the wheels it names; and what keeps its time."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = 6  # of ours: three functions, with and without keys kept of the reference
SCRIPT = ROOT / "benchmarks" / "gpu.py"
BARE = ("torch", "transformers")  # what a GPU machine has, with what these need
# Makes modules of no named wheel as absent as they are on a bare machine. Read by every Python process below.
HIDER = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a whole run filled."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(HIDER.format(hidden=sorted(hidden())))
    command = [sys.executable, SCRIPT, "--tiny", "--device", "cpu", "--out", folder / "out"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def results(measured: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((measured / "gpu.json").read_text())["results"]
    return found


@pytest.fixture(autouse=True)
def _beside_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def hidden() -> set[str]:
    """Top-level modules of everything that is installed here and that a bare machine lacks."""
    named = re.search(r"pip install (.*)", SCRIPT.read_text())
    assert named, "the script does not say which wheels it needs"
    there = needed({*BARE, *(Requirement(one.strip("'")).name for one in named[1].split())})
    modules = {
        name
        for name, distributions in packages_distributions().items()
        if not any(normalised(one) in there for one in distributions)
    }
    assert {"fastapi", "sqlalchemy", "onnxruntime", "deflate"} <= modules
    return modules | {"kontextd_server"}


def needed(names: set[str]) -> set[str]:
    """These distributions and all that they require."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = normalised(waiting.pop())
        found.add(name)
        required = map(Requirement, requires(name) or [])
        wanted = {one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})}
        waiting |= {one for one in wanted if normalised(one) not in found and is_installed(one)}
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_installed(name: str) -> bool:
    return any(normalised(name) in map(normalised, found) for found in packages_distributions().values())


def test_every_part_has_figures(results: dict[str, dict[str, Any]]) -> None:
    from gpu_parts.parts import all_parts

    assert {part.name for part in all_parts()} <= results.keys()
    assert {name: result["error"] for name, result in results.items() if "error" in result} == {}
    for part in all_parts():
        assert results[part.name]["figures"], part.name


def test_whole_edits_tell_seconds_steps_memory_and_graphs(results: dict[str, dict[str, Any]]) -> None:
    from gpu_parts.parts import STEPS, Work, all_parts

    edits = [part for part in all_parts() if part.work in (Work.STOCK, Work.EDIT)]
    assert len(edits) == 4 + 2 * 3 * 2
    for part in edits:
        figures = results[part.name]["figures"]
        kinds = figures["steps"]
        assert len(kinds) == STEPS
        assert ("c" in kinds and "." in kinds) == (part.preset in ("regular", "high"))
        assert figures["step_s"].keys() == {{"F": "full", "c": "cached", ".": "skipped"}[kind] for kind in kinds}
        assert min(figures["seconds"], figures["peak_bytes"], figures["tflop"]) > 0
        assert figures["recompiled"] == 0
        assert ("merge_s" in figures) == (part.loras > 0 and part.preset in ("", "none"))  # the others find them there


def test_ours_is_compiled_while_the_model_loads_and_never_again(results: dict[str, dict[str, Any]]) -> None:
    """Traced and guarded as for a GPU's compiler; a way that failed would have been given up for an uncompiled one."""
    from gpu_parts.parts import Work, all_parts

    for precision in ("fp8", "bf16"):
        assert results[f"start of the process: ours, {precision}"]["graphs"] == GRAPHS
    for part in all_parts():
        figures = results[part.name]["figures"]
        if part.work is Work.EDIT:
            assert figures["graphs"] == 0
        if part.work in (Work.EDIT, Work.SIZES):
            assert figures["execution"]["blocks"] == "compiled with native attention"
    assert results["stock diffusers, compiled"]["figures"]["graphs"] > 0


def test_ours_computes_what_diffusers_computes(results: dict[str, dict[str, Any]]) -> None:
    assert results["none bf16"]["figures"]["distance_to_stock"] < 1e-5  # the CPU runs it in float32
    assert 0 < results["none fp8"]["figures"]["distance_to_stock"] < 0.1


def test_all_preferred_sizes_run_without_compiling_anew(results: dict[str, dict[str, Any]]) -> None:
    for precision in ("bf16", "fp8"):
        figures = results[f"sizes {precision}"]["figures"]
        assert len({row["size"] for row in figures["sizes"]}) == 17
        assert len({row["tokens"] for row in figures["sizes"]}) > 5
        assert figures["recompiled"] == 0


def test_there_is_a_trace_of_a_step_of_each_kind(measured: Path, results: dict[str, dict[str, Any]]) -> None:
    for precision in ("bf16", "fp8"):
        steps = results[f"trace {precision}"]["figures"]["steps"]
        assert steps.keys() == {"full", "cached", "skipped"}
        for step in steps.values():
            with gzip.open(measured / step["file"]) as file:
                assert json.load(file)["traceEvents"]
            assert step["longest"][0]["ms"] > 0


def test_the_table_and_the_plot_show_every_edit_beside_the_seconds_of_others(measured: Path) -> None:
    from gpu_parts.parts import Work, all_parts
    from gpu_parts.published import OTHERS

    table = (measured / "gpu.md").read_text()
    texts = {node.text for node in ElementTree.parse(measured / "gpu.svg").iter() if node.tag.endswith("text")}
    for part in all_parts():
        if part.work in (Work.STOCK, Work.EDIT):
            assert f"| {part.name} |" in table
            assert part.name in texts
    for one in OTHERS:
        assert f"| {one.name} | {one.seconds:.2f} | {one.kind} | {one.source} |" in table
        assert f"{one.name} ({one.kind})" in texts


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert "no CUDA device" in ran.stdout
    assert not (tmp_path / "out").exists()


# Time is kept, and nothing that fails takes the rest with it.

FAULTY = """
import os, time

def work(results, options, parts):
    results.send({"started": True})
    for part in parts:
        match part.preset:
            case "hangs":
                time.sleep(600)
            case "dies":
                os._exit(3)
            case "fails":
                results.send({"error": "ValueError: no"})
            case "breaks":
                results.send({"error": "CUDA error", "ends_process": True})
            case _:
                results.send({"figures": {"pid": os.getpid()}})
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures parts of these presets, in one group, with the worker above."""
    from gpu_parts.parts import Options, Part, Work
    from gpu_parts.supervise import measure

    (tmp_path / "faulty_worker.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))

    def results(*presets: str, deadline_s: float = 60.0) -> dict[str, dict[str, Any]]:
        parts = [Part("all", Work.EDIT, 3.0, preset=preset) for preset in presets]
        return dict(measure(parts, Options("cuda", True, tmp_path), "faulty_worker", deadline_s))

    return results


@pytest.mark.parametrize(
    ("preset", "error", "starts"),
    [
        ("hangs", "its time was over", 2),
        ("dies", "its process died", 2),
        ("breaks", "CUDA error", 2),
        ("fails", "ValueError: no", 1),
    ],
)
def test_a_part_that_goes_wrong_is_told_of_and_the_next_one_runs(
    run: Any, preset: str, error: str, starts: int
) -> None:
    results = run("first", preset, "last")
    assert error in results[f"{preset} bf16"]["error"]
    assert results["first bf16"]["figures"]
    assert results["last bf16"]["figures"]
    assert sum(name.startswith("start of the process") for name in results) == starts


def test_after_the_deadline_nothing_is_begun(run: Any) -> None:
    began = time.monotonic()
    results = run("hangs", "first", "last", deadline_s=7.5)
    assert time.monotonic() - began < 60
    assert {name for name, result in results.items() if "not run: the deadline" in result.get("error", "")} == {
        "first bf16",
        "last bf16",
    }
