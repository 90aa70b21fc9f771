"""What `kontextd serve` cannot start with: it ends at once, with one line that names what is wrong and the remedy."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kontextd_models.embedded import embedded_model_dir
from kontextd_server.certs import write_certificates
from kontextd_server.cli import main
from kontextd_server.store import migrate, sqlite_url

from .box import NewBox
from .disks import mounted
from .processes import REAL

MISTAKE = 2


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs `kontextd serve` with these options, in this process, and returns the one line that it says."""
    monkeypatch.setattr("kontextd_server.worker.supervise", started_all_the_same)
    monkeypatch.setenv("KONTEXTD_DATA", str(tmp_path / "data"))

    def start(*options: str) -> str:
        assert main(["serve", "--port", "0", *options]) == MISTAKE
        shown = capsys.readouterr()
        assert shown.out == ""
        (said,) = shown.err.splitlines()
        return said.removeprefix("kontextd: ")

    return start


def started_all_the_same(*_: object, **__: object) -> int:
    raise AssertionError("it started")


def test_a_port_that_is_taken_ends_the_process(new_box: NewBox) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        run = new_box().command("serve", "--port", str(port), program=REAL)
        assert run.exit_code() == MISTAKE
    told = f"cannot listen at 127.0.0.1 port {port}: Address already in use. Choose others with --host and --port."
    assert (run.printed, run.logged) == ("", f"kontextd: {told}\n")


def test_a_model_folder_with_a_broken_file(refusal: Refusal, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model_dir(), folder)
    weights = next((folder / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = refusal("--model", str(folder))
    assert str(weights) in said
    assert "again" in said


def test_a_model_folder_that_is_none(refusal: Refusal, tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'} is not a folder. Give" in refusal("--model", str(tmp_path / "absent"))


def test_a_certificate_without_its_key(refusal: Refusal, tmp_path: Path) -> None:
    assert refusal("--tls-cert", str(tmp_path / "c.pem")).startswith("--tls-cert needs --tls-key beside it")


def test_a_certificate_with_another_key(refusal: Refusal, tmp_path: Path) -> None:
    one, other = (write_certificates(tmp_path / name, ["localhost"]) for name in ("one", "other"))
    said = refusal("--tls-cert", str(one.leaf), "--tls-key", str(other.leaf_key))
    assert said.startswith(f"the certificate {one.leaf} with the key {other.leaf_key} cannot be used: ")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() == 0:  # who may write whatever the mode says
        with mounted(folder, "ro"):
            yield folder
    else:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)


def test_a_data_folder_that_nobody_may_write_in(refusal: Refusal, read_only: Path) -> None:
    for data in (read_only, read_only / "new", Path(__file__) / "below-a-file"):
        said = refusal("--data", str(data))
        assert said.startswith(f"the data folder {data} cannot be used: ")
        assert said.endswith("Choose another with --data.")


def test_a_folder_for_temporary_files_with_too_long_a_path(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket of a child could be made there, however often it is tried."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    long = tmp_path / ("x" * 70)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    said = refusal()
    assert said.startswith(f"the path of the folder for temporary files, {long}, is too long for sockets in it: ")
    assert said.endswith("Set TMPDIR to a shorter one.")
    assert list(long.iterdir()) == []
    assert not (tmp_path / "data").exists()


def test_a_database_of_a_newer_version(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "newer.sqlite"
    migrate(sqlite_url(path))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    said = refusal("--database", sqlite_url(path))
    assert "made by a newer version of kontextd" in said
    assert said.endswith("upgrade kontextd.")
