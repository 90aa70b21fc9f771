"""A backup by the lines of operations.md, made while the box works, and restored by them into another folder."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from .box import Box, NewBox, swept
from .calls import Caller
from .processes import is_alive, until
from .test_serving import group_of

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
CP_SAW_SOME_GO = 1
WENT = re.compile(r"cp: cannot (stat|open) '.*'( for reading)?: No such file or directory")


@pytest.fixture
def lines() -> tuple[str, str]:
    """What an operator pastes: to back up, and to restore."""
    section = OPERATIONS.read_text(encoding="utf-8").partition("\n## Backups\n")[2].partition("\n## ")[0]
    backup, restore = re.findall(r"(?:^    .*\n)+", section, re.M)
    return backup, restore


def run(script: str, data: Path, copy: Path) -> None:
    """Paste the lines, with the folders of this test."""
    here = {"/opt/kontextd/bin/python": sys.executable, "/var/lib/kontextd": str(data), "/backup/monday": str(copy)}
    for documented, ours in here.items():
        script = script.replace(documented, ours)
    assert str(data) in script
    assert str(copy) in script
    ran = subprocess.run(["sh", "-e"], input=script, capture_output=True, text=True, timeout=120)
    told = ran.stderr.splitlines()
    some_went = ran.returncode == CP_SAW_SOME_GO and told and all(WENT.fullmatch(line) for line in told)
    assert ran.returncode == 0 or some_went, ran.stderr


@contextmanager
def at_work(anna: Caller) -> Iterator[list[str]]:
    """Somebody submits and uploads all the time; yields the ids."""
    made: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            made.append(anna.submit())
            anna.upload(f"upload {len(made)}".encode())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: made, "work beside the backup")
        yield made
    finally:
        stop.set()
        thread.join()


def test_a_copy_of_a_working_box_serves_its_old_results_and_runs_what_was_not_done(
    new_box: NewBox, gate: Path, tmp_path: Path, lines: tuple[str, str]
) -> None:
    (back_up, restore), copy = lines, tmp_path / "copy"
    box = new_box("old", lease_s="6")
    first = box.serve(workers=1)
    anna = box.caller()
    photo = anna.upload(b"a photo")
    done = [anna.submit() for _ in range(3)]
    pictures = [anna.made(anna.completed(one)) for one in done]
    running, waiting = anna.submit(f"hold {gate}"), anna.submit()
    box.in_step(running)
    with at_work(anna) as meanwhile:
        run(back_up, box.data, copy)
    gate.touch()
    for request_id in (running, waiting, meanwhile[-1]):
        anna.made(anna.completed(request_id))  # the box itself goes on
    assert first.end() == 0

    restored = in_place_of_another(new_box, restore, copy)
    with httpx.Client(base_url=restored.url, trust_env=False) as anybody:
        assert anybody.get(urlsplit(photo).path).content == b"a photo"
    again = Caller(restored.url, anna.key)
    assert [again.made(again.result(one)) for one in done] == pictures
    for request_id in (running, waiting):
        again.made(again.completed(request_id))
    assert (restored.job(running).attempt, restored.job(waiting).attempt) == (2, 1)
    again.http.close()
    assert restored.runs[0].end() == 0
    assert swept(restored.files) == []


def in_place_of_another(new_box: NewBox, restore: str, copy: Path) -> Box:
    """A box whose own jobs and files the copy replaces."""
    broken = new_box("new")
    run_of_it = broken.serve(workers=1)
    other = broken.caller("other")
    other.made(other.completed(lost := other.submit()))
    run_of_it.send(signal.SIGKILL)
    until(lambda: not any(map(is_alive, group_of(run_of_it))), "the end of what it started")
    assert (broken.data / "jobs.sqlite-wal").exists()  # we have it open
    run(restore, broken.data, copy)
    restored = new_box("new", lease_s="6")
    restored.serve(workers=1)
    assert restored.store.views.status(lost) is None
    return restored
