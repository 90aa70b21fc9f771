"""`kontextd lora` as an operator meets it, and `kontextd edit --lora`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import tiny_lora
from kontextd_models import LoraWeight
from kontextd_server.cli import main
from kontextd_server.cli_edit import parse_lora
from kontextd_server.fetch.roots import LoraRoots
from kontextd_server.picture_files import UsageError
from PIL import Image

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def _tiny_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KONTEXTD_MODEL", str(tiny_folder))
    monkeypatch.setenv("KONTEXTD_DATA", str(tmp_path / "data"))


@pytest.fixture
def lora() -> Command:
    return lambda action, *arguments: main(["lora", action, *map(str, arguments)])


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return tiny_lora.write(tmp_path / "ink.safetensors", rank=8, seed=1, trigger="inkstyle")


@pytest.fixture
def wash(tmp_path: Path) -> Path:
    """The model has no place for three of its tensors."""
    return tiny_lora.write(tmp_path / "wash.safetensors", seed=2, unknown=3)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Of a model of another size."""
    return tiny_lora.write(tmp_path / "wide.safetensors", width=48)


# inspect


def test_an_inspection_tells_what_a_file_is(lora: Command, wash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("inspect", wash) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["file"] == str(wash)
    assert rows["sha256"] == sha256(wash.read_bytes()).hexdigest()
    assert rows["size"].endswith("bytes, F32 9")
    assert (rows["dialect"], rows["rank"], rows["triggers"]) == ("diffusers", "4", "none named")
    assert rows["form"] == "low-rank 3; changes transformer 3"
    assert rows["coverage"] == "6 of 9 tensors have a place in tiny random model"
    assert rows["unused"].startswith("transformer.no_such_block.0.lora_A.weight, ")
    assert rows["usable"] == "yes"


def test_an_inspection_as_json_has_all_there_is_to_know(
    lora: Command, ink: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("inspect", ink, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["coverage"]["matched"], found["coverage"]["total"], found["problem"]) == (6, 6, "")
    assert found["description"]["trigger_words"] == ["inkstyle"]
    assert (found["ranks"]["most_common"], found["model"]) == (8, "tiny random model")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_model_cannot_use_is_told_with_exit_code_1(
    lora: Command, wide: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    assert lora("inspect", wide, *(["--json"] if as_json else [])) == 1
    shown = capsys.readouterr()
    assert "wide.safetensors" in (json.loads(shown.out)["problem"] if as_json else shown.out.splitlines()[-1])
    assert shown.err == ""


def test_of_another_architecture_it_says_which(
    lora: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_lora.write(tmp_path / "x.safetensors", modules=["unet.down_blocks.1.attentions.0.proj_in"])
    assert lora("inspect", file) == 1
    assert "none of FLUX; it looks like" in capsys.readouterr().out


def test_values_that_no_training_leaves_are_seen_before_a_request_fails_of_them(
    lora: Command, ink: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ink.write_bytes(ink.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    assert lora("inspect", ink) == 1
    assert "holds the value nan, where weights are about 1" in capsys.readouterr().out.splitlines()[-1]
    assert lora("add", ink) == 2
    assert "use an earlier checkpoint. Nothing was added." in capsys.readouterr().err


@pytest.mark.parametrize("action", ["inspect", "add"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no file; check the path."),
        (b"<!doctype html>", "a web page"),
        (b"\x80\x04x", "a pickle"),
        (b"", "empty"),
    ],
)
def test_what_is_no_sound_file_is_a_mistake_of_one_line(
    lora: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, content: bytes | None, said: str
) -> None:
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert lora(action, file) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"kontextd: {file}")
    assert said in shown.err
    assert shown.err.count("\n") == 1


# The library.


def test_a_file_is_added_listed_and_removed(
    lora: Command, ink: Path, wash: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert lora("add", ink) == 0
    assert capsys.readouterr().err == ""
    assert lora("add", wash, "--name", "styles wash") == 0
    assert "tiny random model has no place for 3 of its tensors: transformer.no" in capsys.readouterr().err
    assert (tmp_path / "data" / "loras" / "ink.safetensors").read_bytes() == ink.read_bytes()
    assert lora("list") == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["path", "dialect", "rank"]
    assert first.split() == ["library:ink", "diffusers", "8", "0.0", "6/6", "inkstyle"]
    assert second.split() == ["library:styles", "wash", "diffusers", "4", "0.0", "6/9"]
    assert lora("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["path"], one["rank"], one["model"]) for one in listed] == [
        ("library:ink", 8, "tiny random model"),
        ("library:styles wash", 4, "tiny random model"),
    ]
    assert listed[0]["sha256"] == sha256(ink.read_bytes()).hexdigest()
    assert lora("remove", "ink", "--json") == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out), shown.err) == ({"name": "ink", "status": "removed"}, "removed ink\n")
    assert lora("remove", "ink") == 2
    assert "the library has no 'ink'; see kontextd lora list." in capsys.readouterr().err


def test_what_cannot_be_used_is_not_added(
    lora: Command, ink: Path, wide: Path, wash: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("add", wide) == 2
    assert "Nothing was added." in capsys.readouterr().err
    assert lora("add", ink, "--name", "a/b") == 2
    assert "'a/b' is no name for the library" in capsys.readouterr().err
    assert lora("add", ink) == 0
    assert lora("add", wash, "--name", "ink") == 2
    assert "library:ink stands for another file" in capsys.readouterr().err
    assert lora("list", "--json") == 0


def test_looking_makes_no_folder(lora: Command, ink: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action, *arguments in (("list",), ("inspect", ink), ("remove", "x")):
        lora(action, *arguments)
        assert not (tmp_path / "data").exists()


# kontextd edit


@pytest.fixture
def edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str, bytes]]:
    """Exit code, stdout, stderr and the picture."""
    source, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.effect_noise((64, 64), 60).convert("RGB").save(source)

    def run(*options: str) -> tuple[int, str, str, bytes]:
        code = main(["edit", str(source), "x", "-o", str(out), "--seed", "1", "--steps", "1", "--no-safety", *options])
        shown = capsys.readouterr()
        return code, shown.out, shown.err, out.read_bytes() if code == 0 else b""

    return run


def test_an_edit_with_loras_tells_how_much_of_them_fitted(
    edit: Callable[..., tuple[int, str, str, bytes]], lora: Command, ink: Path, wash: Path
) -> None:
    lora("add", ink)
    plain = edit()[3]
    code, out, _, picture = edit("--lora", f"{wash}:0.5", "--lora", "library:ink")
    assert code == 0
    assert picture != plain
    assert f"{wash}  scale 0.5  diffusers  6 of 9 tensors used" in out.splitlines()
    assert "library:ink  scale 1  diffusers  6 of 6 tensors used" in out.splitlines()
    code, out, _, same = edit("--lora", f"{ink}:1.0", "--lora", f"{wash}:0.5", "--json")
    assert same == picture
    result = json.loads(out)
    assert [(one["name"], one["scale"], one["matched"], one["total"]) for one in result["loras"]] == [
        (str(ink), 1.0, 6, 6),
        (str(wash), 0.5, 6, 9),
    ]
    assert result["cache_hits"]["loras"] is False
    assert result["timings"]["merge"] > 0


def test_mistakes_with_loras_are_one_line_each(
    edit: Callable[..., tuple[int, str, str, bytes]], ink: Path, wide: Path
) -> None:
    for text, said in (
        (f"{wide}", "wide.safetensors"),
        (f"{ink}:99", "scale is 99.0; it must be a number from -10 to 10."),
        ("library:ink", "the root 'library' holds no such file"),
        ("library:../ink", "is no path in a root"),
        ("nowhere.safetensors:1", "there is no such file; give PATH or PATH:SCALE."),
    ):
        code, out, err, _ = edit("--lora", text)
        assert (code, out) == (2, ""), text
        assert err.startswith("kontextd: --lora"), err
        assert said in err
        assert err.count("\n") == 1, err


def test_a_lora_is_a_path_and_a_scale(tmp_path: Path, ink: Path) -> None:
    odd = tmp_path / "odd:2"
    odd.touch()
    roots = LoraRoots({"studio": tmp_path})
    for text, path, scale, name in (
        (f"{ink}", ink, 1.0, f"{ink}"),
        (f"{ink}:0.5", ink, 0.5, f"{ink}"),
        (f"{ink}:-1", ink, -1.0, f"{ink}"),
        (f"{odd}", odd, 1.0, f"{odd}"),
        (f"{odd}:3", odd, 3.0, f"{odd}"),
        ("studio:ink", ink, 1.0, "studio:ink"),
        ("studio:ink.safetensors:-0.25", ink, -0.25, "studio:ink.safetensors"),
    ):
        assert parse_lora(text, roots) == LoraWeight(path, scale, name)
    with pytest.raises(UsageError):
        parse_lora("other:ink:1", roots)
