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
    assert "guard: up to 2 skipped steps run where the forecast before was off by more than 5.0%: then up to " in high
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
    assert high["flops_share_at_most"] == pytest.approx(high["flops_share"] * 6 / 4, rel=0.05)


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
