"""Hostile names: whatever an uploader calls his file, the key is harmless and the name comes back as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kontextd_server.files import FolderStore, Label
from kontextd_server.files.names import UNKNOWN_TYPE, safe_name, stated_type, token_of

HOSTILE = [
    "../../etc/passwd",
    "..\\..\\windows\\system32\\cmd.exe",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cx.png",
    "....//....//x",
    "/absolute/path.png",
    "C:\\photos\\a.png",
    "a\x00.png",
    "nul\x00",
    "CON",
    "aux.txt",
    ".htaccess",
    "..",
    ".",
    "",
    "   ",
    "/",
    "a/",
    "x" * 5000 + ".png",
    "x." + "y" * 5000,
    "photo\u202egnp.exe",  # right-to-left override: shown as photoexe.png
    "\u2066\u2067a.png",
    "日本語.png",
    "e\u0301\u0301\u0301.jpg",
    "a.png\r\nSet-Cookie: x=1",
    '"><script>alert(1)</script>.svg',
    "a;b&c|d`e`$(f).png",
    "-rf.png",
    "~root",
    "\ud800.png",
    "ﬁle．png",
    "a?b#c.png",
]


def test_a_plain_name_stays_as_it_is() -> None:
    for name in ("photo.png", "My_Photo-2.final.jpeg", "lora.safetensors", "README", "a.tar.gz"):
        assert safe_name(name) == name


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\x\\cmd.exe", "cmd.exe"),
        ("a b.png", "a-b.png"),
        ("日本語.png", "file.png"),
        (".htaccess", "htaccess"),
        ("..", "file"),
        ("", "file"),
        ("photo\u202egnp.exe", "photo-gnp.exe"),
        ("x" * 500 + ".safetensors", "x" * 67 + ".safetensors"),
        ("a.b?c", "a.b-c"),
    ],
)
def test_what_is_left_of_a_name(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_harmless_and_kept_as_it_was(store: FolderStore, name: str) -> None:
    before = outside(store)
    stored = store.put([b"x"], Label(name))
    assert store.info(stored.key).file_name == name[:255]
    assert re.fullmatch(r"[a-z2-7]{26}-[A-Za-z0-9][A-Za-z0-9._-]{0,79}", stored.key)
    assert outside(store) == before


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400))
def test_every_name_becomes_a_short_harmless_one(name: str) -> None:
    safe = safe_name(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", safe)
    assert ".." not in safe
    assert not safe.endswith(".")
    assert safe_name(safe) == safe
    assert token_of("a" * 26 + "-" + safe) == "a" * 26


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=300), kind=st.text(max_size=300))
def test_any_label_comes_back(store: FolderStore, name: str, kind: str) -> None:
    stored = store.put([b"x"], Label(name, kind))
    assert store.info(stored.key) == stored
    assert stored.file_name == name[:255]
    assert stored.content_type in (kind, UNKNOWN_TYPE)


@pytest.mark.parametrize("kind", ["text/plain", "image/png; x=1", "made/up", "no slash at all", "x" * 255])
def test_any_stated_type_is_kept(kind: str) -> None:
    assert stated_type(kind) == kind


@pytest.mark.parametrize(
    "kind", ["", " ", "text/plain\r\nX-Evil: 1", "text/plain\n", "té/xt", "x" * 256, "\x00", "a\tb"]
)
def test_a_type_that_could_not_stand_in_a_header_is_unknown(kind: str) -> None:
    assert stated_type(kind) == UNKNOWN_TYPE


def outside(store: FolderStore) -> list[Path]:
    """What lies beside the store, where a name that climbs would put its file."""
    return sorted(path for path in store.root.parent.rglob("*") if store.root not in (path, *path.parents))
