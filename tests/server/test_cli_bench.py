"""`kontextd bench` as an operator meets it, on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_lora
from kontextd_models.acceleration.preset import Preset
from kontextd_models.errors import OutOfMemory
from kontextd_models.trials.cases import Case
from kontextd_models.trials.running import Run, Runner
from kontextd_server import cli_bench
from kontextd_server.cli import main
from PIL import Image

STEPS = ["--steps", "4", "--no-safety"]
ROWS = {"none": {}, "regular": {}, "high": {"computed": 0.5, "prefix": 1, "reuse_reference": True}}


@pytest.fixture(autouse=True)
def _tiny_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "rows.json"
    table.write_text(json.dumps({"about": "made up here", "presets": ROWS}))
    monkeypatch.setenv("KONTEXTD_MODEL", str(tiny_folder))
    monkeypatch.setenv("KONTEXTD_PRESETS", str(table))


@pytest.fixture
def pictures(tmp_path: Path, photo: Callable[[int, int], Image.Image]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(64, 64).save(folder / "square.png")
    photo(100, 60).save(folder / "wide.jpg")
    return folder


def test_a_bench_prints_tables_and_leaves_a_report_that_needs_nothing_else(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ink, out = tiny_lora.write(tmp_path / "ink.safetensors"), tmp_path / "out" / "bench"
    options = ["--image", str(pictures), "--prompt", "make it <red>", "--lora", f"{ink}:0.5", "--repeats", "1"]
    assert main(["bench", *options, "--out", str(out), *STEPS]) == 0
    shown = capsys.readouterr()
    assert "4/4  wide, 'make it <red>', ink:0.5" in shown.err
    speed, fidelity, report = shown.out.split("\n\n")
    assert len(speed.splitlines()) == 2 + 3 * 4
    assert re.search(r"^80x48 +ink:0\.5 +high +1 +1 +1 +2 +[\d.]+ s +[\d.]+ +[\d.]+ s", speed, re.M)
    assert re.search(r"^no LoRA +regular +2 +60\.0 dB +equal +1\.0000", fidelity, re.M)
    assert "LPIPS is left out" in fidelity
    assert report == f"report: {out / 'report.html'}\n"
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 4 * 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "url(" not in page
    assert "<script" not in page
    assert "make it &lt;red&gt;" in page
    assert page.count("<circle") == 8 + 4 + 1
    results = json.loads((out / "results.json").read_text())
    assert results["presets"]["about"] == "made up here"
    assert results["machine"]["model"]["name"] == "tiny random model"
    assert results["versions"]["torch"].startswith("2.")
    assert results["command"].startswith("kontextd")
    assert [row["psnr"] for row in results["pictures"] if row["preset"] == "regular"] == [None] * 4
    assert {tuple(row["size"]) for row in results["speed"]} == {(64, 64), (80, 48)}
    assert results["speed"][0]["seconds"]["encode_prompt"] > 0  # encoded anew, as for a request


def test_json_is_the_results_and_nothing_goes_to_stderr(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    options = ["--image", str(pictures / "square.png"), "--prompt", "x", "--sizes", "64x64", "96X48", "--repeats", "2"]
    assert main(["bench", *options, "--json", "--out", str(out), *STEPS]) == 0
    shown = capsys.readouterr()
    results = json.loads(shown.out)
    assert results == json.loads((out / "results.json").read_text())
    assert [(row["size"], row["edits"]) for row in results["speed"][::3]] == [([64, 64], 2), ([96, 48], 2)]
    assert shown.err == ""


def test_two_loras_of_one_name_have_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers gives every LoRA the same name."""
    for place, seed in (("ink", 1), ("wash", 2)):
        (tmp_path / place).mkdir()
        tiny_lora.write(tmp_path / place / "pytorch_lora_weights.safetensors", seed=seed)
    loras = [f"--lora={tmp_path / place / 'pytorch_lora_weights.safetensors'}" for place in ("ink", "wash")]
    assert (
        main(["bench", "--prompt", "x", *loras, "--repeats", "1", "--json", "--out", str(tmp_path / "b"), *STEPS]) == 0
    )
    results = json.loads(capsys.readouterr().out)
    names = ["no LoRA", "ink/pytorch_lora_weights:1", "wash/pytorch_lora_weights:1"]
    assert [(row["loras"], row["edits"]) for row in results["speed"][::3]] == [(name, 1) for name in names]
    assert [row["loras"] for row in results["fidelity"][::2]] == names


def test_warnings_of_the_engine_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wash = tiny_lora.write(tmp_path / "wash.safetensors", unknown=2)
    options = ["--prompt", "x", "--lora", str(wash), "--repeats", "2", "--out", str(tmp_path / "b"), *STEPS]
    assert main(["bench", *options]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("have no place in this model") == 1
    assert "have no place in this model" in (tmp_path / "b" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "tiny random model names no instructions of its own; give --prompt TEXT, once or more."),
        (["--prompt", "x", "--image", "nowhere"], "--image nowhere is no file and no folder; check the path."),
        (["--prompt", "x", "--image", "{empty}"], "holds no photo; name a file, or a folder with"),
        (["--prompt", "x", "--repeats", "0"], "--repeats is 0; it must be at least 1."),
        (["--prompt", "x", "--sizes", "70x70"], "--sizes holds 70x70, which the model makes as 64x64; give that, or"),
        (["--prompt", "x", "--steps", "99"], "--steps is 99; it must be a whole number from 1 to 50."),
        (["--prompt", "x", "--guidance", "nan"], "--guidance is nan; it must be a number"),
        (["--prompt", "x", "--lora", "nowhere"], "--lora nowhere: there is no such file"),
        (["--prompt", "x", "--out", "{file}"], "--out {file} cannot be made a folder: {file} is a file; name another."),
        (["--prompt", "x", "--presets", "nowhere.json"], "nowhere.json is missing."),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"empty": str(tmp_path / "empty"), "file": str(tmp_path / "rows.json")}
    out = [] if "--out" in options else ["--out", str(tmp_path / "bench")]
    assert main(["bench", *(word.format(**names) for word in options), *out, "--json"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert said.format(**names) in shown.err
    assert not (tmp_path / "bench").exists()


def test_every_scale_and_every_prompt_is_looked_at_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(_: object) -> None:
        raise AssertionError("the command was wrong")

    monkeypatch.setattr(cli_bench, "load_engine", loading)
    ink = tiny_lora.write(tmp_path / "ink.safetensors")
    for options, said in (
        (["--lora", str(ink), "--lora", f"{ink}:0.5", f"{ink}:50"], "loras[1] ({ink}): scale is 50.0; it must be a"),
        (["--prompt", "y\udc80"], "prompt is not Unicode text"),
    ):
        assert main(["bench", "--prompt", "x", *options, "--out", str(tmp_path / "b"), "--json"]) == 2
        assert said.format(ink=ink) in capsys.readouterr().err


def test_an_error_leaves_a_report_of_the_rounds_that_were_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edits: list[str] = []
    run = Runner.run

    def failing(self: Runner, case: Case, row: Preset) -> Run:
        edits.append(case.prompt)
        if edits.count("y") == 2:
            raise OutOfMemory("the cpu device ran out of memory.")
        return run(self, case, row)

    monkeypatch.setattr(Runner, "run", failing)
    options = ["--prompt", "x", "--prompt", "y", "--repeats", "1", "--out", str(tmp_path / "b"), *STEPS]
    assert main(["bench", *options]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()[-1]) == ("", "kontextd: the cpu device ran out of memory.")
    assert f"report of what was measured: {tmp_path / 'b' / 'report.html'}" in shown.err
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (results["rounds"], results["rounds_planned"]) == (1, 2)
    assert {row["prompt"] for row in results["pictures"]} == {"x"}
    assert "broken off: these are figures of 1 of 2 rounds." in (tmp_path / "b" / "report.html").read_text()


def test_an_error_before_the_first_round_is_over_leaves_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Run:
        raise OutOfMemory("the cpu device ran out of memory.")

    monkeypatch.setattr(Runner, "run", failing)
    assert main(["bench", "--prompt", "x", "--out", str(tmp_path / "b"), *STEPS]) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("text", ["64", "64x", "x64", "0x64", "64x-1", "64x64x3", "999999x1"])
def test_what_is_no_size_is_refused_with_the_remedy(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--sizes", text])
    assert ended.value.code == 2
    assert "use WIDTHxHEIGHT, as 1024x1024." in capsys.readouterr().err
