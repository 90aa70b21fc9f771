"""`kontextd` as a user meets it: what it writes, what it prints, how it refuses, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kontextd_models import load_engine
from kontextd_models.checks import Check
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.fingerprint import fingerprint
from kontextd_models.probe import versions
from kontextd_server import cli_edit
from kontextd_server.cli import main
from kontextd_server.settings import Settings, names_of, variable
from PIL import Image

STEPS = ["--steps", "2"]


@pytest.fixture(autouse=True)
def _tiny_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXTD_MODEL", str(tiny_folder))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_an_edit_writes_the_picture_and_says_where_it_lies(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = picture.with_name("out.jpg")
    assert main(["edit", str(picture), "make it sepia", "-o", str(out), "--seed", "7", *STEPS]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"{out}  80x64  seed 7"
    assert "denoise" in shown.out
    assert "step 2/2" in shown.err
    assert size_of(out) == (80, 64)


def test_json_is_one_object_with_all_there_is_to_know(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["edit", str(picture), "make it sepia", "--num-images", "2", "--seed", "7", "--json", *STEPS]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert [row["seed"] for row in result["images"]] == [7, 8]
    assert [row["has_nsfw_concepts"] for row in result["images"]] == [False, False]
    assert [Path(row["path"]).name for row in result["images"]] == ["photo.edited-0.png", "photo.edited-1.png"]
    assert [size_of(Path(row["path"])) for row in result["images"]] == [(80, 64)] * 2
    assert result["timings"]["total"] > 0
    assert result["cache_hits"] == {"prompt": False, "reference": False}
    assert (result["size"]["width"], result["size"]["height"]) == (80, 64)
    assert result["model"]["name"] == "tiny random model"
    assert "step" not in shown.err


def test_the_same_seed_gives_the_same_file_and_an_old_one_is_replaced(picture: Path) -> None:
    out = picture.with_name("out.png")
    written = []
    for seed in ("3", "3", "4"):
        assert main(["edit", str(picture), "make it sepia", "-o", str(out), "--seed", seed, *STEPS]) == 0
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]


def test_every_option_reaches_the_engine(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edited(*options: str) -> tuple[bytes, dict[str, object]]:
        assert main(["edit", str(picture), "x", "--seed", "1", "--json", *options]) == 0
        return picture.with_name("photo.edited.png").read_bytes(), json.loads(capsys.readouterr().out)

    plain, _ = edited(*STEPS)
    assert edited("--steps", "3")[0] != plain
    assert edited("--guidance", "5", *STEPS)[0] != plain
    assert edited("--resolution", "1:1", *STEPS)[1]["size"]["width"] == 64
    assert edited("--no-safety", *STEPS)[1]["timings"]["safety"] < 1e-3


def test_a_flagged_picture_is_black_and_said_to_be(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXTD_SAFETY_THRESHOLD", "0")
    assert main(["edit", str(picture), "make it sepia", *STEPS]) == 0
    assert "flagged by the safety checker" in capsys.readouterr().out
    with Image.open(picture.with_name("photo.edited.png")) as image:
        assert not np.asarray(image).any()


def test_previews_are_written_where_asked(picture: Path) -> None:
    folder = picture.parent / "a" / "previews"
    arguments = [
        "edit",
        str(picture),
        "x",
        "--preview",
        str(folder),
        "--num-images",
        "2",
        "--no-safety",
        "--steps",
        "3",
    ]
    assert main(arguments) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"image-{image}-step-0{step}.png" for image in (0, 1) for step in (1, 2, 3)]
    assert max(size_of(folder / names[0])) <= 256


@pytest.mark.parametrize("options", [["--steps", "99"], ["--device", "tpu"]])
def test_an_edit_that_is_refused_leaves_no_folder_for_previews(picture: Path, options: list[str]) -> None:
    folder = picture.parent / "a/previews"
    assert main(["edit", str(picture), "x", "--preview", str(folder), *options]) == 2
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{folder}/nowhere.png", "x"], "nowhere.png is no file; check the path."),
        (["{photo}", "x", "-o", "{photo}"], "is the input itself"),
        (["{photo}", "x", "-o", "{folder}/out.gif"], "name it .png, .jpg or .jpeg"),
        (["{photo}", "x", "-o", "{folder}/nowhere/out.png"], "does not exist; make it first"),
        (["{photo}", "x", "--steps", "99"], "--steps is 99; it must be a whole number from 1 to 50."),
        (["{photo}", "x", "--seed", "-1"], "--seed is -1; it must be a whole number from 0 to"),
        (["{photo}", "x", "--guidance", "nan"], "--guidance is nan; it must be a number"),
        (["{photo}", "x", "--num-images", "5"], "--num-images is 5; it must be a whole number from 1 to 4."),
        (["{photo}", "x", "--num-images", "0"], "--num-images is 0;"),
        (["{photo}", "x", "--lora", "x" * 300], "there is no such file; give PATH or PATH:SCALE."),
        (["{photo}", "x", "--lora", "{photo}:0.5"], "photo.png"),
        (["{photo}", "x", "--lora", "nowhere.safetensors"], "there is no such file; give PATH or PATH:SCALE."),
        (["{photo}", "x", "--device", "tpu"], "device is 'tpu'; it must be auto, cpu"),
        (["{photo}", "x", "--model", "{folder}/nowhere"], "is not a folder."),
        (["{text}", "x"], "the file is text, not an image."),
        (["{text}", "x", "--preview", "{photo}"], "cannot be made a folder: {photo} is a file; name another."),
        (["{text}", "x", "--preview", "{photo}/a/b"], "cannot be made a folder: {photo} is a file; name another."),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy_and_ends_with_2(
    picture: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    text = picture.with_name("notes.txt")
    text.write_text("not a picture, just words\n" * 10)
    before = {path: path.read_bytes() for path in picture.parent.iterdir()}
    filled = [part.format(photo=picture, folder=picture.parent, text=text) for part in arguments]
    assert main(["edit", *filled]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("kontextd: ")
    assert said.format(photo=picture) in line
    assert {path: path.read_bytes() for path in picture.parent.iterdir()} == before


def test_a_number_of_images_is_looked_at_before_so_many_names_are_made(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def targets(*_: object) -> None:
        raise AssertionError("a billion names")

    monkeypatch.setattr(cli_edit, "targets", targets)
    assert main(["edit", str(picture), "x", "--num-images", "1000000000"]) == 2
    said = "kontextd: --num-images is 1000000000; it must be a whole number from 1 to 4.\n"
    assert capsys.readouterr().err == said


def test_a_mistyped_setting_ends_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXTD_DEVIEC", "cpu")
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "kontextd: KONTEXTD_DEVIEC is no setting; did you mean KONTEXTD_DEVICE?\n"


def test_a_safety_checker_that_cannot_answer_ends_with_1_and_no_picture(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXTD_SAFETY_TIME_LIMIT_S", "1e-9")
    assert main(["edit", str(picture), "x", *STEPS]) == 1
    assert "No image is handed out unchecked." in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in picture.parent.iterdir()] == ["photo.png"]


def test_a_full_disk_ends_with_1_and_is_named(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: bytes) -> None:
        path.write_text("half a picture")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["edit", str(picture), "x", "--no-safety", *STEPS]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in picture.parent.iterdir()] == ["photo.png"]


def test_a_traceback_is_shown_only_where_it_is_asked_for(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["edit", str(picture), "x", "--steps", "99"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("KONTEXTD_DEBUG", "1")
    assert main(["edit", str(picture), "x", "--steps", "99"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_leaves_no_file(picture: Path) -> None:
    with Image.open(picture) as small:  # so large that not all images are made before the signal comes
        small.resize((256, 256)).save(picture)
    command = [
        sys.executable,
        "-m",
        "kontextd_server.cli",
        "edit",
        str(picture),
        "x",
        "--steps",
        "50",
        "--num-images",
        "4",
        "--model",
        str(embedded_model_dir()),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stderr is not None
    while "step" not in process.stderr.readline():  # the first fifth of the steps is done
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "kontextd: interrupted."
    assert "Traceback" not in err
    assert [path.name for path in picture.parent.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["edit", "--help"],
        ["verify", "--help"],
        ["presets", "--help"],
        ["bench", "--help"],
        ["calibrate", "--help"],
        ["serve", "--help"],
        ["worker", "--help"],
        ["keys", "create", "--help"],
        ["jobs", "list", "--help"],
        ["files", "prune", "--help"],
        ["lora", "add", "--help"],
        ["mirror", "add", "--help"],
        ["certs", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from kontextd_server.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy', 'onnxruntime', 'fastapi', 'starlette',\n"
        "    'uvicorn', 'sqlalchemy', 'pydantic', 'cryptography', 'httpcore2'} & sys.modules.keys()\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr == "[]\n"
    assert "usage: kontextd" in ran.stdout


def test_help_lists_the_commands_and_each_server_command_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert not ended.value.code
        return capsys.readouterr().out

    commands = re.findall(r"^    (\w+)", shown().partition("commands:")[2].partition("\n\n")[0], re.M)
    assert commands == [
        "serve",
        "worker",
        "keys",
        "jobs",
        "files",
        "lora",
        "mirror",
        "certs",
        "edit",
        "info",
        "doctor",
        "verify",
        "presets",
        "bench",
        "calibrate",
    ]
    for command in ("serve", "worker"):
        text = shown(command)
        assert all(f"  {variable(name)} " in text for name in names_of(Settings))


def test_an_option_that_is_empty_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """What an unset variable of a script becomes must not mean the folder it runs in."""
    assert main(["info", "--model", ""]) == 2
    assert capsys.readouterr().err == "kontextd: --model is empty; give it a value, or leave it out.\n"


def test_an_unknown_option_and_no_command_at_all_end_with_2() -> None:
    for arguments in (["edit", "--nonsense"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_info_says_what_was_chosen_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in ("tiny random model", "cpu, float32", "resident: on the CPU", "1024 to 16384 pixels", "diffusers 0.42"):
        assert part in shown
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["memory_mode"] == "resident"
    assert found["versions"]["diffusers"].startswith("0.42")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["certs", "--out", "{folder}"], ["--help"], ["edit", "--help"], ["--version"]])
def test_a_reader_that_goes_away_is_no_error_of_ours(arguments: list[str], unbuffered: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kontextd_server.cli", *(word.format(folder=tmp_path) for word in arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(writer)
    # argparse passes over a write that fails, and so learns nothing where nothing is buffered.
    assert (ran.returncode, ran.stderr) == (0 if unbuffered and "--help" in arguments else 1, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_where_standard_streams_are_closed(closed: str, tmp_path: Path) -> None:
    picture, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.new("RGB", (64, 64)).save(picture)
    command = [sys.executable, "-m", "kontextd_server.cli", "edit", str(picture), "x", "-o", str(out), *STEPS]
    ran = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True)
    assert (ran.returncode, size_of(out)) == (0, (64, 64)), ran.stderr
    assert ("step 2/2" in ran.stderr) == ("2>" not in closed)


def test_doctor_records_sums_and_then_compares_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny

    # What torch sees of a machine takes seconds to find out, and is looked at where the doctor itself is tested.
    report = {"gpus": [], "cuda_build": None, "network_attempts": []}
    monkeypatch.setattr("kontextd_models.doctor.check_torch", lambda: (Check("torch", True, "it imports"), report))
    folder = str(tiny.build(tmp_path / "model"))
    assert main(["doctor", "--model", folder, "--record"]) == 0
    assert "files have the sums they should" in capsys.readouterr().out
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["doctor", "--model", folder, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    (wrong,) = [row for row in report["checks"] if row["passed"] is False]
    assert wrong["name"] == "hashes"
    assert wrong["figures"]["wrong"] == ["vae/diffusion_pytorch_model.safetensors"]


def test_verify_writes_its_report_even_where_a_proof_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second process, which is left to the tests of the proofs, takes longer than all of them here.
    monkeypatch.setattr("kontextd_models.verify.fingerprint_elsewhere", lambda config: fingerprint(load_engine(config)))
    out = tmp_path / "report.json"
    assert main(["verify", "--out", str(out)]) == 1  # random weights cannot give a photo back where it was
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["checks"] if row["passed"] is False] == ["alignment"]
    assert (report["passed"], report["versions"]["torch"].startswith("2.")) == (False, True)
    assert report["seconds"] > 0
    shown = capsys.readouterr().out
    assert "FAILED  alignment" in shown
    assert f"report: {out}" in shown


def test_a_report_of_verify_that_cannot_be_written_whole_leaves_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    out.write_text("before")
    code = """
import resource, signal, sys
import kontextd_models.verify
from kontextd_models.checks import Check
from kontextd_server.cli import main
kontextd_models.verify.checks = lambda _: [Check("long", True, "x" * 4000)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
sys.exit(main(["verify", "--out", sys.argv[1]]))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert (ran.returncode, out.read_text()) == (1, "before")
    assert "File too large" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("out", ["{tmp}", "/dev/null"])
def test_verify_replaces_no_more_than_a_file(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--out", out.format(tmp=tmp_path)]) == 2
    assert "cannot be written; name a file" in capsys.readouterr().err


def test_verify_refuses_a_report_it_could_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--out", str(tmp_path / "nowhere/report.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.split() == ["kontextd", *versions()["kontextd"].split()]
