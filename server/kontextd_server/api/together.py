"""Look-ups made together: whoever asks while one is under way is answered by the next. Knows asyncio; knows no jobs.

Each answer is found out after it was asked for, so nothing is ever told that was true only before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Asked = Sequence[tuple[K, asyncio.Future[V | None]]]


class Together(Generic[K, V]):
    """`look_up` is called by one task at a time, and begun at most every `every_s` seconds.

    What it raises is raised to all who were waiting for it; what it leaves out is None to who asked for it.
    """

    def __init__(self, look_up: Callable[[Collection[K]], Awaitable[Mapping[K, V]]], every_s: float = 0.0) -> None:
        self._look_up, self._every_s = look_up, every_s
        self._asked: list[tuple[K, asyncio.Future[V | None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._next_at = 0.0

    async def get(self, key: K) -> V | None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[V | None] = loop.create_future()
        self._asked.append((key, answer))
        if self._task is None:
            self._task = loop.create_task(self._run(loop))
        return await answer

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._asked:
                # At least one turn of the loop: what came from the network at the same time comes along.
                await asyncio.sleep(max(0.0, self._next_at - loop.time()))
                asked, self._asked = self._asked, []
                self._next_at = loop.time() + self._every_s
                await self._answer(asked)
        finally:
            self._task = None

    async def _answer(self, asked: Asked[K, V]) -> None:
        try:
            found = await self._look_up({key for key, _ in asked})
            for key, answer in asked:
                if not answer.done():  # cancelled: nobody waits for it any more
                    answer.set_result(found.get(key))
        except Exception as error:
            for _, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
        finally:
            for _, answer in asked:
                answer.cancel()  # where this task itself was cancelled; what has an answer keeps it
