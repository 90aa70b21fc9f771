"""The library of LoRA files: what is kept, what is refused, and that a name stands for one whole file or for none."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import tiny_lora
from kontextd_models.folder import check_folder
from kontextd_models.lora.inspection import Inspection, inspect
from kontextd_models.lora.layout import layout_of_folder
from kontextd_models.records import LoraLimits
from kontextd_server.files.errors import StoreFull
from kontextd_server.lora_library import KeptLora, LibraryError, LoraLibrary

MODEL = "tiny random model"


@pytest.fixture
def library(tmp_path: Path) -> LoraLibrary:
    return LoraLibrary(tmp_path / "loras", clock=lambda: 1_700_000_000.0)


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return tiny_lora.write(tmp_path / "ink.safetensors", rank=8, unknown=1, trigger="inkstyle, wet")


@pytest.fixture
def look(tiny_folder: Path) -> object:
    layout = layout_of_folder(check_folder(tiny_folder))

    def found(file: Path) -> Inspection:
        return inspect(file, layout, LoraLimits(), file.name)

    return found


def test_a_file_is_kept_with_what_was_found(library: LoraLibrary, ink: Path, look: object) -> None:
    kept = library.add(ink, look(ink), MODEL)
    content = ink.read_bytes()
    assert kept == KeptLora(
        name="ink",
        sha256=sha256(content).hexdigest(),
        size_bytes=len(content),
        dialects=("diffusers",),
        rank=8,
        trigger_words=("inkstyle", "wet"),
        matched=6,
        total=7,
        model=MODEL,
        added_at=1_700_000_000.0,
    )
    assert kept.path == "library:ink"
    ink.unlink()
    assert (library.root / "ink.safetensors").read_bytes() == content
    assert library.files() == [kept]
    assert (library.root.stat().st_mode & 0o777) == 0o700


def test_files_are_listed_by_name_and_removed(library: LoraLibrary, ink: Path, look: object) -> None:
    for name in ("b", "a.safetensors", "grün v2"):
        library.add(ink, look(ink), MODEL, name)
    assert [kept.path for kept in library.files()] == ["library:a", "library:b", "library:grün v2"]
    assert library.remove("b.safetensors")
    assert not library.remove("b")
    assert [kept.name for kept in library.files()] == ["a", "grün v2"]
    assert sorted(path.name for path in library.root.iterdir()) == [
        ".lock", "a.json", "a.safetensors", "grün v2.json", "grün v2.safetensors",
    ]  # fmt: skip


def test_whoever_reads_a_file_that_is_removed_reads_on(library: LoraLibrary, ink: Path, look: object) -> None:
    library.add(ink, look(ink), MODEL)
    with (library.root / "ink.safetensors").open("rb") as reading:
        library.remove("ink")
        assert reading.read() == ink.read_bytes()


def test_a_name_stands_for_one_content(library: LoraLibrary, ink: Path, look: object, tmp_path: Path) -> None:
    first = library.add(ink, look(ink), MODEL)
    assert library.add(ink, look(ink), MODEL) == first
    other = tiny_lora.write(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(LibraryError, match=r"library:ink stands for another file. .*kontextd lora remove 'ink'"):
        library.add(other, look(other), MODEL, "ink")
    assert library.files() == [first]
    library.remove("ink")
    assert library.add(other, look(other), MODEL, "ink").sha256 != first.sha256


def test_what_the_model_cannot_use_is_refused(library: LoraLibrary, look: object, tmp_path: Path) -> None:
    wide = tiny_lora.write(tmp_path / "wide.safetensors", width=48)
    with pytest.raises(LibraryError, match=r"wide\.safetensors.*Nothing was added\."):
        library.add(wide, look(wide), MODEL)
    assert not library.root.exists()


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "..", "a/b", "/etc/x", "a\\b", "a:b", "a\nb", "x" * 101, "墨" * 67, "a\udc80", ".safetensors"],
)
def test_a_name_that_a_request_could_not_send_is_refused(
    library: LoraLibrary, ink: Path, look: object, name: str
) -> None:
    for change in (lambda: library.add(ink, look(ink), MODEL, name), lambda: library.remove(name)):
        with pytest.raises(LibraryError, match="is no name for the library"):
            change()


def test_a_file_that_changes_while_it_is_copied_is_not_kept(library: LoraLibrary, ink: Path, look: object) -> None:
    found = look(ink)
    tiny_lora.write(ink, seed=5)
    with pytest.raises(LibraryError, match="changed while it was copied"):
        library.add(ink, found, MODEL)
    assert library.files() == []
    assert [path.name for path in library.root.iterdir()] == []


def test_what_lies_there_without_a_record_or_with_a_damaged_one_is_not_listed(
    library: LoraLibrary, ink: Path, look: object, caplog: pytest.LogCaptureFixture
) -> None:
    kept = library.add(ink, look(ink), MODEL)
    (library.root / "by hand.safetensors").write_bytes(ink.read_bytes())
    (library.root / "gone.json").write_text(json.dumps({"name": "gone"}))
    for number, text in enumerate(("{", "{}", '{"name": 3}', json.dumps({**vars(kept), "new": 1}))):
        (library.root / f"damaged{number}.safetensors").write_bytes(b"")
        (library.root / f"damaged{number}.json").write_text(text)
    assert library.files() == [kept]
    assert caplog.text.count("is damaged") == 4


CHILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kontextd_models.errors import KontextdError
from kontextd_models.folder import check_folder
from kontextd_models.lora.inspection import inspect
from kontextd_models.lora.layout import layout_of_folder
from kontextd_models.records import LoraLimits
from kontextd_server.lora_library import LoraLibrary
model, file, root = map(Path, sys.argv[2:5])
found = inspect(file, layout_of_folder(check_folder(model)), LoraLimits())
if len(sys.argv) > 5:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
print("ready", flush=True)
sys.stdin.readline()
try:
    print(LoraLibrary(root).add(file, found, "m", "one").sha256)
except KontextdError as error:
    print(type(error).__name__)
"""


def child(model: Path, file: Path, root: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), str(model), str(file), str(root), *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_of_processes_that_add_under_one_name_at_once_one_wins(
    library: LoraLibrary, tiny_folder: Path, tmp_path: Path
) -> None:
    files = [tiny_lora.write(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(3)]
    adding = [child(tiny_folder, file, library.root) for file in files]
    said = [process.communicate("go\n", timeout=120)[0].strip() for process in adding]
    (kept,) = library.files()
    assert sorted(said) == sorted([kept.sha256, "LibraryError", "LibraryError"])
    assert sha256((library.root / "one.safetensors").read_bytes()).hexdigest() == kept.sha256


def test_a_full_disk_leaves_nothing_behind(library: LoraLibrary, tiny_folder: Path, ink: Path) -> None:
    said, _ = child(tiny_folder, ink, library.root, "full").communicate("go\n", timeout=120)
    assert said.strip() == StoreFull.__name__
    assert library.files() == []
    assert [path.name for path in library.root.iterdir()] == []
