"""Secrets in files: one content for all, private, never half."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kontextd_server.wire.key_files import load_or_create, write_private


def test_of_many_that_make_a_secret_at_once_one_wins_and_all_get_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: load_or_create(path, lambda: b"%d" % index), range(8)))
    assert set(found) == {path.read_bytes()}
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_secret_that_others_can_read_is_used_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0o640)
    assert load_or_create(path, lambda: b"new") == b"x"
    assert "chmod 600" in caplog.text


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 1
