"""No room for a result: its job fails for good and says why, no half file stays, and later jobs succeed."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from kontextd_server.files import FolderLimits, FolderStore
from kontextd_server.settings import read_settings
from kontextd_server.welcome import when_ready

from .box import Box, NewBox, half_files
from .calls import ENDPOINT, Caller, body, detail, picture
from .disks import mounted
from .processes import Running, until

LIMIT_BYTES = 8 * 2**20  # more than SQLite's files come to here
LARGE_SIDE = 2000  # as a PNG 11 MiB


def test_a_file_that_may_not_grow_fails_its_job_and_no_other(box: Box, start_worker: Callable[..., Running]) -> None:
    """By the limit of the process: write(2) then says what it says on a full disk, but for the number."""
    worker, anna = start_worker("limited"), box.caller()
    large = anna.upload(picture(LARGE_SIDE))
    former = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (LIMIT_BYTES, former[1]))
    refused(anna, box, image_url=large)
    anna.made(anna.completed(anna.submit()))  # a small one has room
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, former)
    assert len(anna.made(anna.completed(anna.submit(image_url=large)))) > LIMIT_BYTES
    assert worker.process.poll() is None


def test_a_disk_that_is_full_stops_nothing_for_good(tmp_path: Path, new_box: NewBox, gate: Path) -> None:
    """Database and files on one small disk, as where nothing is set."""
    box = new_box()
    box.data.mkdir(parents=True)
    with mounted(box.data, "size=12m"):
        server = box.serve(workers=1)
        anna = box.caller()
        anna.made(anna.completed(anna.submit()))
        running = anna.submit(f"hold {gate}")
        box.in_step(running)
        fill(box.data / "filler")
        gate.touch()
        until(lambda: "its end cannot be recorded yet" in server.logged, "the worker to meet the full disk")
        answer = anna.http.post(f"/queue/{ENDPOINT}", json=body("nothing"))
        assert answer.status_code == 503  # nothing was accepted: send it again
        assert not anna.is_completed(running)
        (box.data / "filler").unlink()
        assert_full(anna.completed(running))
        anna.made(anna.completed(anna.submit()))
        assert half_files(box.files) == []
        assert len(server.pids("worker-0")) == len(server.pids("api")) == 1  # the same processes all the time
        assert server.end() == 0


def test_a_server_without_room_for_its_own_example_is_ready_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    files = FolderStore(tmp_path, FolderLimits(quota_bytes=10))
    when_ready("http://127.0.0.1:8000", "id:secret", files, read_settings({}))
    assert capsys.readouterr().out == "\nkontextd is ready at http://127.0.0.1:8000\n"
    assert "no room" in caplog.text


def refused(caller: Caller, box: Box, **fields: object) -> None:
    """A job that fails because there is no room."""
    before = {path for path in box.files.rglob("*") if path.is_file()}
    assert_full(caller.completed(caller.submit(**fields)))
    assert half_files(box.files) == []
    assert {path for path in box.files.rglob("*") if path.is_file()} - before <= {box.files / "usage"}


def assert_full(result: httpx.Response) -> None:
    status, _ = detail(result)
    assert status >= 500
    assert status not in (502, 503, 504), "the client would post it again"
    assert "full" in result.json()["detail"]


def fill(path: Path) -> None:
    """To the last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
