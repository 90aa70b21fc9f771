"""Files that are no LoRA, or want to do harm: each is refused with what it is and what to do, by its header."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraFileError
from kontextd_models.lora.file_checks import open_checked
from safetensors.torch import save_file

LIMITS = LoraLimits(max_tensors=1000)
KEY = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """What is said of a file with these bytes."""

    def check(content: bytes, limits: LoraLimits = LIMITS) -> str:
        path = tmp_path / "style.safetensors"
        path.write_bytes(content)
        return message_of(path, limits)

    return check


def message_of(path: Path, limits: LoraLimits = LIMITS) -> str:
    with pytest.raises(LoraFileError) as caught, open_checked(path, limits):
        pass
    message = str(caught.value)
    assert len(message) < 700
    assert message.isprintable()
    assert message.endswith(".")
    return message


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int = 0, end: int = 8, **changed: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, end]} | changed


def torch_zip(folder: Path) -> bytes:
    torch.save({"a": torch.zeros(2)}, folder / "x.pt")
    return (folder / "x.pt").read_bytes()


def zipped() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as opened:
        opened.writestr("style.safetensors", "x")
    return file.getvalue()


# What is sound.


def test_a_sound_file_gives_its_tensors_its_metadata_and_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({KEY: torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path, metadata={"a": "ü"})
    kept = bytearray(24)
    with open_checked(path, LIMITS) as file:
        assert (file.name, dict(file.metadata), file.size_bytes) == (
            "style.safetensors",
            {"a": "ü"},
            len(path.read_bytes()),
        )
        assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
            KEY: ("F32", (2, 3)),
            "b": ("BF16", (5,)),
        }
        sha256 = file.read_into({KEY: memoryview(kept)})
    assert struct.unpack("<6f", kept) == (1.0,) * 6
    assert sha256 == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({KEY: torch.ones(2000, 1000)}, path)
    whole = path.read_bytes()
    with open_checked(path, LIMITS) as file:
        os.truncate(path, len(whole) - 1_000_000)
        with pytest.raises(LoraFileError, match="cut short while it was read"):
            file.read_into({})
    path.write_bytes(whole)
    with open_checked(path, LIMITS) as file:
        path.write_bytes(whole + b"more")
        with pytest.raises(LoraFileError, match="grew while it was read"):
            file.read_into({})


def test_a_file_is_checked_without_importing_torch() -> None:
    code = "import sys, kontextd_models.lora.file_checks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_messages_call_a_file_what_the_request_does(tmp_path: Path) -> None:
    with (
        pytest.raises(LoraFileError, match=r"^studio:ink is missing"),
        open_checked(tmp_path / "x", LIMITS, "studio:ink"),
    ):
        pass


# What is something else.


def test_files_that_are_something_else_are_called_by_their_name(refused: Callable[..., str], tmp_path: Path) -> None:
    page = b"\n<!DOCTYPE html><html><title>Sign in</title></html>"
    for content, what, remedy in (
        (page, "a web page", "link of the file itself"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "a web page", "link"),
        (b'{"error": "Unauthorized", "secret": "hunter2"}', "a JSON document", "token"),
        (b'["error"]', "a JSON document", "token"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer", "git lfs pull"),
        (torch_zip(tmp_path), "a zip archive", "Pickles are never read"),
        (zipped(), "a zip archive", "never read"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "a pickle", "Pickles are never read"),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.", "a pickle", "never read"),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), "a GGUF file", "safetensors"),
        (gzip.compress(page, mtime=0), "a packed archive", "Unpack"),
    ):
        message = refused(content)
        assert (what in message, remedy in message) == (True, True), message
        assert "hunter2" not in message  # what a server fetched from inside its network is not handed out


def test_a_truncated_file_is_not_taken_for_a_text(refused: Callable[..., str]) -> None:
    """Though the length of its header may begin with the letter that a page or a JSON document begins with."""
    text = json.dumps({KEY: entry()}).encode()
    for first in b'<{["':
        assert "is truncated: 7 bytes" in refused(packed(text.ljust(256 + first), bytes(7)))


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.safetensors", "x"])
def test_a_pickle_is_never_opened_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(torch_zip(tmp_path))
    assert "Pickles are never read" in message_of(tmp_path / name)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in message_of(tmp_path / "pipe")
    assert "is no file" in message_of(tmp_path)
    assert "is missing" in message_of(tmp_path / "absent.safetensors")
    assert "cannot be read" in message_of(tmp_path / "nul\0.safetensors")
    assert "cannot be read" in message_of(tmp_path / ("x" * 300))


# What is broken, or lies.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: 0 bytes"),
        (b"1234567", "is truncated"),
        (packed({KEY: entry()}, bytes(8))[:-1], "is truncated: 7 bytes of data where 8 are expected"),
        (packed({KEY: entry()}, bytes(9)), "longer than its header says: 9 bytes of data where 8 are expected"),
        (packed({KEY: entry()}, bytes(8))[:40], "is truncated"),
        (packed(b"", b""), "makes no sense"),
        (packed([]), "makes no sense (a list, not an object)"),
        (packed(b"null"), "makes no sense"),
        (packed(b"[" * 99_999), "makes no sense"),
        (packed(json.dumps({KEY: entry()}).encode("utf-16"), bytes(8)), "makes no sense"),
        (packed({}), "has no tensors"),
        (packed({"__metadata__": {"a": "b"}}), "has no tensors"),
        (packed({KEY: entry(), "b": entry()}, bytes(8)), "b begins at byte 0 of the data, not at 8"),
        (packed({KEY: entry(), "b": entry(12, 20)}, bytes(20)), "b begins at byte 12 of the data, not at 8"),
        (packed({KEY: entry(4, 12)}, bytes(12)), f"{KEY} begins at byte 4 of the data, not at 0"),
        (packed({KEY: entry(-8, 0)}, b""), f"{KEY} begins at byte -8"),
        (packed({KEY: entry(8, 0)}, bytes(8)), "does not take the bytes 8 to 0"),
        (packed({KEY: entry(shape=[3])}, bytes(8)), "F32 [3] does not take the bytes 0 to 8"),
        (packed({KEY: entry(shape=[-1, -2])}, bytes(8)), "shape [-1, -2] is none"),
        (packed({KEY: entry(shape=[2.0])}, bytes(8)), "shape [2.0]"),
        (packed({KEY: entry(shape=[True, 2])}, bytes(8)), "shape [True, 2]"),
        (packed({KEY: entry(shape=["2"])}, bytes(8)), "shape ['2']"),
        (packed({KEY: entry(shape=[2**62, 2**62, 0])}, bytes(8)), f"shape [{2**62}, {2**62}, 0] is none"),
        (packed({KEY: entry(shape=[1] * 17)}, bytes(8)), "is none"),
        (packed({KEY: entry(dtype="F99")}, bytes(8)), "F99"),
        (packed({KEY: entry(dtype=["F32"])}, bytes(8)), "makes no sense"),
        (packed({KEY: entry(data_offsets=[0, 4, 8])}, bytes(8)), "makes no sense"),
        (packed({KEY: {"dtype": "F32"}}, bytes(8)), "shape"),
        (packed(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), bytes(8)), "a is there twice"),
        (packed(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "dtype is there twice"),
        (packed({"__metadata__": {"a": 1}, KEY: entry()}, bytes(8)), "__metadata__ holds other things than texts"),
        (packed({"__metadata__": ["a"], KEY: entry()}, bytes(8)), "__metadata__ holds other things than texts"),
        (packed({"a\0b": entry()}, bytes(8)), r"named 'a\x00b'"),
        (packed({"a\n\x1b[31mb": entry()}, bytes(8)), r"named 'a\n\x1b[31mb'"),
        (packed(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", bytes(8)), r"named '\ud800'"),
        (packed({"\u202e": entry()}, bytes(8)), r"named '\u202e'"),
        (packed({"": entry()}, bytes(8)), "named '', 0 characters long"),
        (packed({"a" * 5000: entry()}, bytes(8)), "5000 characters long"),
        (packed({"a" * 50_000: entry(4, 12)}, bytes(12)), "begins at byte 4"),
        (packed({"a": entry(dtype="x" * 50_000)}, bytes(8)), "xxx…"),
        (packed(b"x", length=2**63), "is truncated, or no safetensors file"),
        (packed(b"{" + b" " * 600_000, length=600_001), "has a header of 600001 bytes; the most allowed is 512000"),
        (packed({str(number): entry(0, 0, shape=[0]) for number in range(1001)}), "has 1001 tensors; the most allowed"),
    ],
)  # fmt: skip
def test_a_broken_or_lying_file_is_refused_and_the_message_says_how(
    refused: Callable[..., str], content: bytes, message: str
) -> None:
    assert message in refused(content)


def test_a_file_over_the_limit_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)  # sparse: takes no room
    assert "has 5368709120 bytes; the most allowed is 4294967296" in message_of(path, LoraLimits())


def test_a_header_of_a_hundred_thousand_tensors_is_refused(refused: Callable[..., str]) -> None:
    one = json.dumps(entry(0, 0, shape=[0]))
    content = packed(("{" + ",".join(f'"{number}":{one}' for number in range(100_000)) + "}").encode())
    assert "100000 tensors; the most allowed is 20000" in refused(content, LoraLimits())


def test_numbers_that_take_long_to_multiply_or_print_are_refused_at_once(refused: Callable[..., str]) -> None:
    digits = "9" * 4000
    shape = "[" + ",".join([digits] * 100) + "]"
    text = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 8]}}}}'
    assert "makes no sense" in refused(packed(text.encode(), bytes(8)))
    assert "makes no sense" in refused(packed(text.replace(shape, "9" * 5000).encode(), bytes(8)))


@given(st.binary(max_size=200))
def test_no_bytes_make_the_check_fail_in_any_other_way(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for data in (content, struct.pack("<Q", len(content)) + content):
        path.write_bytes(data)
        message_of(path)
