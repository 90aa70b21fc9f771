"""Waiting for a job without a thread: from the store's watcher to asyncio. Knows topics and time; knows no jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kontextd_server.store import Watcher


class Wake:
    """One waiter. A hint may be missing, so `wait` also ends after a while without one: look again each time."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._hinted = asyncio.Event()

    def hint(self) -> None:
        self._hinted.set()

    async def wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._hinted.wait()
        self._hinted.clear()


class Wakeups:
    """Makes waiters: subscribe first, look then, wait last."""

    def __init__(self, watcher: Watcher, poll_s: float) -> None:
        self._watcher, self._poll_s = watcher, poll_s

    @contextmanager
    def on(self, topic: str) -> Iterator[Wake]:
        loop, wake = asyncio.get_running_loop(), Wake(self._poll_s)

        def hint() -> None:  # in the watcher's thread
            loop.call_soon_threadsafe(wake.hint)

        with self._watcher.subscribe(topic, on_hint=hint):
            yield wake
