"""`kontextd presets`, and what `kontextd edit` says of the preset it used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kontextd_models.acceleration.cost import Shape, share
from kontextd_models.acceleration.planning import plan
from kontextd_models.acceleration.table import SHIPPED, read_table
from kontextd_models.records import Acceleration
from kontextd_server.cli import main
from PIL import Image

ROWS = {
    "none": {},
    "regular": {"summary": "two thirds", "computed": 0.6, "prefix": 3, "reuse_reference": True, "forecast_order": 0},
    "high": {"computed": 0.4, "prefix": 3, "guard": {"residual": 0.05, "extra_steps": 2}},
}


@pytest.fixture(autouse=True)
def _tiny_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXTD_MODEL", str(tiny_folder))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"about": "made up here", "precision": "fp8", "presets": ROWS}))
    return path


def test_it_shows_what_each_preset_does(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--presets", str(table), "--steps", "10"]) == 0
    head, none, regular, high, legend = capsys.readouterr().out.split("\n\n")
    assert head.splitlines() == [
        "tiny random model, 10 steps, an output and a reference of the native area",
        f"from {table}, for fp8",
        "made up here",
    ]
    assert " ".join(none.split()) == (
        "none every step, every token FFFFFFFFFF 10 full 0 cached 0 skipped 100.0% of the FLOPs"
    )
    lines = regular.splitlines()
    assert lines[0] == "regular  two thirds"
    assert lines[1].split() == ["FFF..c.c.c"]
    assert lines[2].split()[:6] == ["3", "full", "3", "cached", "4", "skipped"]
    assert lines[3].strip() == "a skipped step takes the last velocity"
    assert "high 4 of 10 steps: all in full; the rest is forecast FFF......F" in " ".join(high.split())
    assert (
        "guard: adds at most 2 steps, of 4, 5 (counted from 1), each where the forecast of the one before was off by "
        "more than 5%: then up to 60"
    ) in " ".join(high.split())
    assert max(map(len, high.splitlines())) <= 100
    assert legend.startswith("F every token")


def test_the_share_is_that_of_the_models_own_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a card without limits of its own the native area is Kontext's; the tiny one's is 64x64."""
    assert main(["presets", "--json", "--presets", str(SHIPPED)]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = Shape(
        double_blocks=1,
        single_blocks=2,
        heads=2,
        head_width=16,
        channels=64,
        text_width=32,
        pooled_width=32,
        output_tokens=16,
        reference_tokens=16,
        text_tokens=24,
    )
    rows = read_table(SHIPPED).rows
    for row in found["presets"]:
        preset = rows[Acceleration(row["name"])]
        kinds = plan(preset, 28).kinds
        assert row["mask"] == "".join(kinds)
        assert row["full"] + row["cached"] + row["skipped"] == found["steps"] == 28
        assert row["flops_share"] == pytest.approx(share(shape, kinds, trimmed=preset.trim_last_block), abs=1e-4)
        assert row["flops_share_at_most"] == row["flops_share"]
    assert found["file"] == str(SHIPPED)


def test_a_guard_costs_what_it_may_add(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json", "--presets", str(table), "--steps", "10"]) == 0
    high = json.loads(capsys.readouterr().out)["presets"][2]
    assert (high["extra_steps_at_most"], high["mask"].count("F")) == (2, 4)
    assert high["guard_may_run"] == [4, 5]
    assert high["flops_share_at_most"] == pytest.approx(high["flops_share"] * 6 / 4, rel=0.05)
    assert [high["mask"][step - 1] for step in high["guard_may_run"]] == [".", "."]


@pytest.mark.parametrize(
    ("mask", "order", "adds"),
    [
        ("FF...F", 1, "no step, as none is skipped after 3 that ran"),
        ("F....F", 0, "no step, as none is skipped after 2 that ran"),
        ("FFF.FF", 1, "at most 1 step, of 4 (counted from 1), each"),
    ],
)
def test_a_guard_is_told_with_the_steps_that_it_can_add_and_no_others(
    mask: str, order: int, adds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"masks": {"6": mask}, "forecast_order": order, "guard": {"residual": 1e-6, "extra_steps": 3}}
    file = tmp_path / "guarded.json"
    file.write_text(json.dumps({"presets": {**ROWS, "high": row}}))
    assert main(["presets", "--presets", str(file), "--steps", "6"]) == 0
    assert f"guard: adds {adds}" in " ".join(capsys.readouterr().out.split())
    assert main(["presets", "--presets", str(file), "--steps", "6", "--json"]) == 0
    high = json.loads(capsys.readouterr().out)["presets"][2]
    assert high["extra_steps_at_most"] == len(high["guard_may_run"]) == (0 if adds.startswith("no") else 1)
    assert (high["flops_share_at_most"] > high["flops_share"]) == bool(high["guard_may_run"])


def test_a_row_without_a_summary_is_told_by_what_it_does_in_the_steps_that_are_shown(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for steps in ("10", "20", "3"):
        assert main(["presets", "--json", "--presets", str(table), "--steps", steps]) == 0
        found[steps] = [row["summary"] for row in json.loads(capsys.readouterr().out)["presets"]]
    exact = "every step, every token"
    assert found["10"] == [exact, "two thirds", "4 of 10 steps: all in full; the rest is forecast"]
    assert found["20"] == [exact, "two thirds", "8 of 20 steps: all in full; the rest is forecast"]
    assert found["3"] == [exact, "two thirds", exact]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps is 0; it must be a whole number from 1 to 50."),
        (["--steps", "51"], "--steps is 51; it must be"),
        (["--presets", "nowhere.json"], "nowhere.json is missing."),
        (["--model", "nowhere"], "nowhere is not a folder."),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["presets", *arguments]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert said in shown.err


def test_it_needs_no_torch(tiny_folder: Path) -> None:
    code = (
        "import sys\nfrom kontextd_server.cli import main\nassert main(['presets']) == 0\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"


def test_an_edit_with_a_preset_says_how_its_steps_were_carried_out(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    arguments = ["edit", str(photo), "x", "--steps", "10", "--seed", "1", "--no-safety", "--presets", str(table)]
    assert main([*arguments, "--acceleration", "regular"]) == 0
    assert "preset regular  3 steps in full  3 cached  4 skipped" in capsys.readouterr().out.splitlines()
    assert main([*arguments, "--acceleration", "regular", "--num-images", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == {"name": "regular", "full": 6, "cached": 6, "skipped": 8}
    assert main(arguments) == 0
    assert "cached" not in capsys.readouterr().out
