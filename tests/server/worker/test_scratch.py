"""Folders for inputs: there for a job, gone after it, and gone too when their worker was killed."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path

import null_worker
import pytest
from conftest import until
from kontextd_server.files.errors import StoreUnavailable
from kontextd_server.worker.scratch import scratch


def test_a_job_has_an_empty_folder_that_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with scratch(tmp_path / "scratch", "w1") as own:
        with own.job() as folder:
            assert list(folder.iterdir()) == []
            (folder / "deep").mkdir()
            (folder / "deep/image").write_bytes(b"x")
        assert not folder.exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_worker_left_goes_when_the_next_one_starts_and_not_before(
    forkserver: ForkServerContext, tmp_path: Path
) -> None:
    holder = forkserver.Process(target=null_worker.hold_scratch, args=(tmp_path,))
    holder.start()
    until(lambda: list(tmp_path.glob("killed/*/image")))
    with scratch(tmp_path, "w2"):
        assert list(tmp_path.glob("killed/*/image"))
    holder.kill()
    holder.join()
    with scratch(tmp_path, "w3"):
        assert [path.name for path in tmp_path.iterdir()] == ["w3"]


def test_two_workers_of_one_id_are_refused(tmp_path: Path) -> None:
    with scratch(tmp_path, "w1"), pytest.raises(StoreUnavailable, match="an id of its own"), scratch(tmp_path, "w1"):
        pass
