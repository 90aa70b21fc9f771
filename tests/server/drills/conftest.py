"""Boxes for the crash drills: real processes of `kontextd`, some around an engine that does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .box import Box, NewBox
from .processes import Running
from .receiver import Receiver


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that serves without workers, for all drills that start their own. Leases are short.

    But not so short that a busy machine keeps a worker from renewing its own in time.
    """
    made = Box(tmp_path_factory.mktemp("drills") / "box", {"lease_s": "6"})
    made.serve()
    yield made
    made.close()


@pytest.fixture(scope="session")
def supervised_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box whose `serve` keeps two workers running, for all drills that kill what it will start again.

    No lease ends within a test: what a dead worker had runs again because its supervisor says so.
    """
    made = Box(tmp_path_factory.mktemp("drills") / "supervised", {"lease_s": "3600"})
    made.serve(workers=2)
    yield made
    made.close()


@pytest.fixture
def new_box(tmp_path: Path) -> Iterator[NewBox]:
    """Boxes of the test's own; words are settings."""
    made: list[Box] = []

    def make(name: str = "own", **settings: str) -> Box:
        made.append(Box(tmp_path / name, settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def start_worker(box: Box) -> Iterator[Callable[..., Running]]:
    """Starts workers at the shared box, by id, for this test alone; words are settings."""
    started: list[Running] = []

    def start(worker_id: str, **settings: str) -> Running:
        started.append(box.worker(worker_id, **settings))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file for which scripted jobs wait. It is there at the end of the test, so that none waits for ever."""
    path = tmp_path / "gate"
    yield path
    path.touch()


@pytest.fixture
def new_receiver() -> Iterator[Callable[..., Receiver]]:
    """Receivers of webhooks, open from the start."""
    made: list[Receiver] = []

    def make(answer: Callable[[], int] = lambda: 200) -> Receiver:
        made.append(Receiver(answer))
        made[-1].open()
        return made[-1]

    yield make
    for one in made:
        one.close()
