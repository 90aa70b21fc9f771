"""What a killed supervisor leaves goes at the next start; what lives, or is somebody else's, stays."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kontextd_server.worker.socket_folder import SocketFolder


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's folder for temporary files, for this test alone. The path of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def with_socket(folder: Path) -> Path:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as made:
        made.bind(str(folder / "1.sock"))
    return folder


def killed(made: SocketFolder) -> Path:
    """Its folder, as the kernel leaves it."""
    os.close(made._lock)
    return with_socket(made.path)


def test_a_folder_is_private_and_goes_with_its_supervisor(temporary: Path) -> None:
    made = SocketFolder()
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    with_socket(made.path)
    made.close()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_one_left_goes_and_what_a_living_one_has_stays(temporary: Path) -> None:
    living, left = SocketFolder(), killed(SocketFolder())
    with_socket(living.path)
    new = SocketFolder()
    assert not left.exists()
    assert set(temporary.iterdir()) == {living.path, new.path}
    assert (living.path / "1.sock").exists()
    for one in (living, new):
        one.close()


def test_what_is_called_alike_but_is_none_stays(temporary: Path) -> None:
    folder, file, link = (temporary / f"kontextd-serve-{name}" for name in ("notes", "file", "link"))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file.touch()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(with_socket(elsewhere))
    SocketFolder().close()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (elsewhere / "1.sock").exists()
    assert set(temporary.iterdir()) == {folder, file, link, elsewhere}
