"""What `benchmarks/gpu.py` says of results that are made up: goals missed, graphs compiled again, what others reach."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeAlias

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
AS_MEASURED, TINY, ON_A_CPU = (), ("--tiny",), ("--device", "cpu")
TRIED = "blocks compiled with flash attention and kernels take 0.912 times as long as compiled with flash attention"

Results: TypeAlias = dict[str, dict[str, Any]]  # Any: figures as gpu.json has them


@dataclass(frozen=True)
class Told:
    status: int
    stderr: str
    table: str
    data: dict[str, Any]


@pytest.fixture(autouse=True)
def _beside_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.fixture
def results() -> Results:
    """A run on a GPU in which everything is as promised."""
    from gpu_parts.parts import Work, all_parts

    execution = {"precision": "fp8", "blocks": "compiled", "notes": [], "tried": [TRIED]}
    edit = {"step_s": {"full": 0.1}, "tflop": 1.0, "tflop_per_s": 1.0, "peak_bytes": 1, "recompiled": 0}
    figures: dict[Work, dict[str, Any]] = {
        Work.STOCK: {**edit, "seconds": 15.0},
        Work.EDIT: {**edit, "execution": execution},
        Work.SIZES: {"sizes": [{"full_s": 0.1}], "recompiled": 0, "execution": execution},
        Work.TRACE: {"steps": {}},
        Work.STAGES: {"stages_s": {}},
    }
    made: Results = {part.name: {"part_s": 1.0, "figures": dict(figures[part.work])} for part in all_parts()}
    for part in all_parts():
        if part.goal_s is not None:
            made[part.name]["figures"]["seconds"] = part.goal_s  # to the last bit: that is met
    return made


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Runs the script's `main` on results that nobody measured."""
    spec = spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)

    def told(results: Results, *options: str) -> Told:
        monkeypatch.setattr(script, "measure", lambda *_: iter(results.items()))
        monkeypatch.setattr(script, "sees_cuda", lambda: True)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *options])
        status = script.main()
        data = json.loads((tmp_path / "gpu.json").read_text())
        return Told(status, capsys.readouterr().err, (tmp_path / "gpu.md").read_text(), data)

    return told


def test_a_run_as_promised_says_so_and_ends_with_0(results: Results, tell: Callable[..., Told]) -> None:
    told = tell(results)
    assert (told.status, told.stderr) == (0, "")
    assert told.data["misses"] == {"goals": [], "recompiled": [], "fell_back": []}
    assert "Goals: 12 met, 0 missed, 0 not measured." in told.table
    assert "missed:" not in told.table


def test_a_missed_goal_is_told_everywhere_and_fails(results: Results, tell: Callable[..., Told]) -> None:
    results["none fp8"]["figures"]["seconds"] = 5.801
    results["high bf16, 3 LoRAs"]["figures"]["seconds"] = 2.0
    told = tell(results, "--device", "cuda:0")
    assert told.status == 1
    assert told.data["misses"]["goals"] == [
        {"part": "none fp8", "seconds": 5.801, "goal_s": 5.8},
        {"part": "high bf16, 3 LoRAs", "seconds": 2.0, "goal_s": 1.6},
    ]
    lines = (
        "Goals missed:\n\n- none fp8: 5.801 s, the goal is ≤ 5.8 s\n- high bf16, 3 LoRAs: 2.000 s, the goal is ≤ 1.6 s"
    )
    assert lines in told.table
    assert told.stderr.strip() == lines
    assert "Goals: 10 met, 2 missed, 0 not measured." in told.table


def test_a_way_that_fell_back_is_told_everywhere_and_fails(results: Results, tell: Callable[..., Told]) -> None:
    note = "blocks compiled with flash attention and kernels failed and are not used: no kernel image"
    execution = {"precision": "fp8", "blocks": "compiled", "notes": [note], "tried": []}
    results["none fp8"]["figures"]["execution"] = results["high fp8"]["figures"]["execution"] = execution
    told = tell(results)
    assert told.status == 1
    assert told.data["misses"]["fell_back"] == [note]
    assert told.stderr.strip() == f"Fell back:\n\n- {note}"
    assert f"Fell back:\n\n- {note}" in told.table


def test_what_was_not_measured_is_no_miss_and_fails_too(results: Results, tell: Callable[..., Told]) -> None:
    results["none fp8"] = {"error": "not run: the deadline had come"}
    results["sizes fp8"] = {"error": "Traceback:\n  somewhere\nValueError: no"}
    told = tell(results)
    assert told.status == 1
    assert told.data["misses"] == {"goals": [], "recompiled": [], "fell_back": []}
    assert told.stderr.strip() == (
        "Not measured:\n\n"
        "- none fp8 (its goal is neither met nor missed): not run: the deadline had come\n"
        "- sizes fp8: ValueError: no"
    )
    assert told.stderr.strip() in told.table
    assert "Goals: 11 met, 0 missed, 1 not measured." in told.table


@pytest.mark.parametrize("options", [AS_MEASURED, TINY, (*TINY, *ON_A_CPU)])
@pytest.mark.parametrize("part", ["stock diffusers, compiled", "regular fp8", "sizes bf16"])
def test_graphs_compiled_again_are_told_and_fail_on_any_model(
    results: Results, tell: Callable[..., Told], part: str, options: tuple[str, ...]
) -> None:
    results[part]["figures"]["recompiled"] = 3
    told = tell(results, *options)
    assert told.status == 1
    assert told.data["misses"]["recompiled"] == [{"part": part, "graphs": 3}]
    assert told.stderr.strip() == f"Compiled again after the warm-up, in graphs:\n\n- {part}: 3"
    assert told.stderr.strip() in told.table


@pytest.mark.parametrize("options", [TINY, (*TINY, *ON_A_CPU), ON_A_CPU])
def test_of_a_tiny_model_and_of_a_cpu_goals_say_nothing(
    results: Results, tell: Callable[..., Told], options: tuple[str, ...]
) -> None:
    results["none fp8"]["figures"]["seconds"] = 100.0
    told = tell(results, *options)
    assert (told.status, told.stderr) == (0, "")
    assert told.data["misses"] == {"goals": None, "recompiled": [], "fell_back": None}
    assert "nothing is said of them" in told.table
    assert "≤" not in told.table


def test_how_a_way_that_was_tried_compared_is_told_once_for_each_precision(
    results: Results, tell: Callable[..., Told]
) -> None:
    told = tell(results)
    assert told.data["results"]["none fp8"]["figures"]["execution"]["tried"] == [TRIED]
    assert told.table.count(f"- {TRIED}") == 2


def test_seconds_that_nobody_measured_are_derived_with_their_arithmetic() -> None:
    from gpu_parts.published import OTHERS

    derived = [one for one in OTHERS if one.kind != "published"]
    assert [one.name for one in derived] == ["flux-fast, fp8"]
    for one in derived:
        baseline, claimed = map(float, one.derivation.split(" / "))
        assert baseline in {other.seconds for other in OTHERS if other.kind == "published"}
        assert one.seconds == baseline / claimed
        assert f"{claimed}x" in one.source
        assert one.kind == f"derived: {one.derivation}"
