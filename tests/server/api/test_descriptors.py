"""How many files a process may open, and what it says when that was not enough."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kontextd_server.api.descriptors import Shortage, raise_limit


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_the_most_there_is(limits: tuple[int, int]) -> None:
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    raise_limit()
    soft, still_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (soft, still_hard) == (min(hard, 1_048_576), hard)
    raise_limit()  # nothing is left to do
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_a_limit_that_cannot_be_raised_is_told(
    limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    with monkeypatch.context() as patched:

        def refuse(*_: object) -> None:
            raise ValueError("not permitted")

        patched.setattr(resource, "setrlimit", refuse)
        raise_limit()
    assert "stays at 256" in caplog.text
    assert "not permitted" in caplog.text


def test_a_shortage_is_told_once_a_minute(limits: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    shortage = Shortage()
    shortage.look(0.0, 3)
    assert not caplog.records
    with ExitStack() as stack:
        lowest_free = os.dup(0)
        stack.callback(os.close, lowest_free)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, limits[1]))
        for now in (1.0, 2.0, 60.9, 61.1):
            shortage.look(now, 3)
    shortage.look(200.0, 3)
    assert [f"limit {lowest_free + 1}, 3 connections" in line.getMessage() for line in caplog.records] == [True, True]
