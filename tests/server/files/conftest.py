"""A store of the test's own, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kontextd_server.files import FolderStore

NOW = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> FolderStore:
    return FolderStore(tmp_path / "files", clock=clock)


@pytest.fixture
def everything_in() -> Callable[[FolderStore], list[str]]:
    """The names of all files below a store that hold contents: not the count, not records."""

    def names(store: FolderStore) -> list[str]:
        paths = (path for path in store.root.rglob("*") if path.is_file())
        return sorted(path.name for path in paths if path.name != "usage" and path.suffix != ".json")

    return names
