"""Look-ups made together: one for many, fresh for each, and no waiter in another's way."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest
from kontextd_server.api.together import Together


class World:
    """Something that changes, and look-ups of it that take as long as a test wants."""

    def __init__(self) -> None:
        self.now = 0
        self.asked: list[set[str]] = []
        self.began_at: list[float] = []
        self.free = asyncio.Event()
        self.free.set()
        self.failure: Exception | None = None

    async def look_up(self, keys: Collection[str]) -> Mapping[str, int]:
        self.began_at.append(asyncio.get_running_loop().time())
        self.asked.append(set(keys))
        seen = self.now
        await self.free.wait()
        if self.failure is not None:
            raise self.failure
        return {key: seen for key in keys if key != "unknown"}

    async def until_asked(self, times: int) -> None:
        while len(self.asked) < times:
            await asyncio.sleep(0)


def ask(together: Together[str, int], *keys: str) -> list[asyncio.Task[int | None]]:
    return [asyncio.ensure_future(together.get(key)) for key in keys]


def test_who_asks_at_the_same_time_is_answered_by_one_look() -> None:
    async def tested() -> None:
        world = World()
        together = Together(world.look_up)
        assert await asyncio.gather(*ask(together, "a", "b", "a", "unknown")) == [0, 0, 0, None]
        assert world.asked == [{"a", "b", "unknown"}]

    asyncio.run(tested())


def test_who_asks_during_a_look_is_answered_by_the_next_and_never_by_what_was_seen_before() -> None:
    async def tested() -> None:
        world = World()
        together = Together(world.look_up)
        world.free.clear()
        early = ask(together, "a")
        await world.until_asked(1)
        world.now = 1
        late = ask(together, "a", "b")
        await asyncio.sleep(0)
        assert len(world.asked) == 1
        world.free.set()
        assert await asyncio.gather(*early, *late) == [0, 1, 1]
        assert world.asked == [{"a"}, {"a", "b"}]

    asyncio.run(tested())


def test_a_failed_look_fails_those_it_was_made_for_and_no_others() -> None:
    async def tested() -> None:
        world = World()
        together = Together(world.look_up)
        world.failure = OSError("away")
        both = await asyncio.gather(*ask(together, "a", "b"), return_exceptions=True)
        assert [type(error) for error in both] == [OSError, OSError]
        world.failure = None
        assert await together.get("a") == 0

    asyncio.run(tested())


@pytest.mark.parametrize("fails", [False, True])
def test_who_goes_away_disturbs_nobody(fails: bool) -> None:
    async def tested() -> None:
        world = World()
        together = Together(world.look_up)
        world.free.clear()
        gone, stays = ask(together, "a", "a")
        await world.until_asked(1)
        gone.cancel()
        world.failure = OSError("away") if fails else None
        world.free.set()
        (told,) = await asyncio.gather(stays, return_exceptions=True)
        assert isinstance(told, OSError) if fails else told == 0
        assert gone.cancelled()

    asyncio.run(tested())


def test_looks_begin_no_more_often_than_they_may() -> None:
    async def tested() -> None:
        world = World()
        together = Together(world.look_up, every_s=0.02)
        for _ in range(4):
            await together.get("a")
        pauses = [later - earlier for earlier, later in zip(world.began_at, world.began_at[1:], strict=False)]
        assert len(pauses) == 3
        assert all(pause >= 0.019 for pause in pauses)

    asyncio.run(tested())
