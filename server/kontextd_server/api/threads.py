"""Blocking calls off the event loop, a bounded number at a time. Knows threads; knows not what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from kontextd_server.api.config import Threads

P = ParamSpec("P")
T = TypeVar("T")


class OffLoop:
    """A lane for each kind of call, so that writers who take turns keep no reader waiting."""

    def __init__(self, sizes: Threads) -> None:
        self._reads, self._writes = CapacityLimiter(sizes.reads), CapacityLimiter(sizes.writes)
        self._files, self._checks = CapacityLimiter(sizes.files), CapacityLimiter(sizes.checks)

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the job store's that changes nothing."""
        return await to_thread.run_sync(lambda: call(*args, **kwargs), limiter=self._reads)

    async def write(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the job store's that changes it."""
        return await to_thread.run_sync(lambda: call(*args, **kwargs), limiter=self._writes)

    async def file(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Something of the file store's."""
        return await to_thread.run_sync(lambda: call(*args, **kwargs), limiter=self._files)

    async def check(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A look at an address, which may take seconds."""
        return await to_thread.run_sync(lambda: call(*args, **kwargs), limiter=self._checks)
