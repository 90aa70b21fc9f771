"""Wake-ups between threads and processes. They are hints: the tests ask that they come, never that they are few."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import pytest
from kontextd_server.store import Claim, LogLine, Store, Subscription, Success, Watcher, topics

Submit, Take = Callable[..., str], Callable[..., Claim]


Settle = Callable[[Subscription], None]


@pytest.fixture
def watcher(store: Store) -> Iterator[Watcher]:
    with_thread = store.watch()
    yield with_thread
    with_thread.close()


@pytest.fixture
def catch_up(store: Store, watcher: Watcher) -> Callable[[], None]:
    """Waits until all has been told that was changed before: hints come in the order of the changes."""

    def wait() -> None:
        with watcher.subscribe("of the test") as own:
            for _ in range(200):  # the first may come before the watching begins
                with store.database.write() as connection:
                    store.database.hint(connection, "of the test")
                if own.wait(0.1) and watcher.connected:
                    return
        raise AssertionError("no hint came")

    return wait


@pytest.fixture
def settle_down(catch_up: Callable[[], None]) -> Settle:
    """Forgets what was told so far; the first hint says only that the watching began."""

    def forget(subscription: Subscription) -> None:
        catch_up()
        subscription.wait(0)

    return forget


def test_a_worker_is_woken_by_a_new_job(watcher: Watcher, submit: Submit, settle_down: Settle) -> None:
    with watcher.subscribe(topics.QUEUE) as subscription:
        settle_down(subscription)
        submit()
        assert subscription.wait(20)


def test_a_worker_is_woken_by_a_job_that_came_back(
    watcher: Watcher, store: Store, submit: Submit, claim: Take, settle_down: Settle
) -> None:
    submit()
    lease = claim().lease
    with watcher.subscribe(topics.QUEUE) as subscription:
        settle_down(subscription)
        store.leases.release(lease)
        assert subscription.wait(20)
        claim()
        settle_down(subscription)
        store.leases.sweep(lost_worker="w1")
        assert subscription.wait(20)


def test_whoever_watches_a_job_hears_of_each_step_and_of_no_other_job(
    watcher: Watcher,
    store: Store,
    submit: Submit,
    claim: Take,
    settle_down: Settle,
    catch_up: Callable[[], None],
) -> None:
    watched, other = submit(), submit()
    with watcher.subscribe(topics.job(watched)) as subscription:
        settle_down(subscription)
        lease = claim().lease
        assert subscription.wait(20)
        settle_down(subscription)
        store.leases.renew(lease, logs=[LogLine("step", 0)])
        assert subscription.wait(20)
        settle_down(subscription)
        store.jobs.request_cancel(other)
        store.leases.renew(lease)
        catch_up()
        assert not subscription.wait(0)
        store.leases.finish(lease, Success(b"{}"))
        assert subscription.wait(20)


def test_asyncio_is_woken_through_the_callback(watcher: Watcher, submit: Submit) -> None:
    async def wait_for_a_job() -> None:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        with watcher.subscribe(topics.QUEUE, on_hint=lambda: loop.call_soon_threadsafe(event.set)):
            await asyncio.sleep(0.3)
            event.clear()
            await asyncio.to_thread(submit)
            await asyncio.wait_for(event.wait(), 20)

    asyncio.run(wait_for_a_job())


def test_a_waiter_whose_function_fails_does_not_end_the_wake_ups_of_others(
    watcher: Watcher, submit: Submit, settle_down: Settle, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("Event loop is closed")

    watcher.subscribe(topics.QUEUE, on_hint=fail)
    with watcher.subscribe(topics.QUEUE) as subscription:
        for _ in range(3):
            settle_down(subscription)
            submit()
            assert subscription.wait(20)
    assert calls == [1]
    assert "a waiter failed" in caplog.text


def test_waiting_ends_after_its_time(watcher: Watcher, settle_down: Settle) -> None:
    with watcher.subscribe(topics.job("none")) as subscription:
        settle_down(subscription)
        before = time.monotonic()
        assert not subscription.wait(0.1)
        assert time.monotonic() - before >= 0.1


def test_closing_wakes_all_who_wait(watcher: Watcher, settle_down: Settle) -> None:
    subscription = watcher.subscribe(topics.QUEUE)
    settle_down(subscription)
    watcher.close()
    assert subscription.wait(0)


def test_more_changes_at_once_than_are_read_wake_everybody(watcher: Watcher, store: Store, settle_down: Settle) -> None:
    with watcher.subscribe(topics.job("last")) as subscription:
        settle_down(subscription)
        with store.database.write() as connection:
            store.database.hint(connection, *(topics.job(str(n)) for n in range(1200)), topics.job("last"))
        assert subscription.wait(20)
        settle_down(subscription)
        with store.database.write() as connection:
            store.database.hint(connection, topics.job("last"))
        assert subscription.wait(20)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_watching_goes_on_after_the_server_broke_the_connections_off(
    watcher: Watcher,
    submit: Submit,
    settle_down: Settle,
    break_connections_off: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with watcher.subscribe(topics.QUEUE) as subscription:
        settle_down(subscription)
        break_connections_off()
        assert subscription.wait(20)  # it is back, and what happened meanwhile is not known
        settle_down(subscription)
        submit()
        assert subscription.wait(20)
    assert "cannot be watched" in caplog.text


def test_watching_goes_on_after_what_nobody_foresaw(
    store: Store, submit: Submit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("unforeseen"), RuntimeError("unforeseen again")])
    connect = store.database.dedicated

    def fail_first() -> AbstractContextManager[Any]:  # Any: see Database.dedicated
        for failure in failures:
            raise failure
        return connect()

    monkeypatch.setattr(store.database, "dedicated", fail_first)
    with closing(store.watch()) as watcher, watcher.subscribe(topics.QUEUE) as subscription:
        assert subscription.wait(20)  # it is back, and what happened meanwhile is not known
        submit()
        assert subscription.wait(20)
        assert watcher.connected
    assert caplog.text.count("watching the job store failed") == 2
