"""Wakes whoever waits for a change made by any process. Knows topics and threads; knows nothing of jobs.

A wake-up is a hint and may be missing when a connection breaks: look again, and look every few seconds without one.
Subscribe first, look then, wait last: so no change falls between looking and waiting.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any

from kontextd_server.store.database import Database
from kontextd_server.store.errors import StoreUnavailable

_log = logging.getLogger(__name__)
_SQLITE_POLL_S = 0.003
_POSTGRES_TURN_S = 0.25  # how long closing may take
_RECONNECT_S = 1.0
_BATCH = 500  # more hints at once wake everybody

Topics = Collection[str] | None  # None: anything may have changed


class Subscription:
    """One waiter. Use it in one thread and as a context manager.

    `on_hint` is called for each hint, in the watcher's thread: it must be quick and raise nothing. The bridge to
    asyncio is `on_hint=lambda: loop.call_soon_threadsafe(event.set)`.
    """

    def __init__(self, watcher: Watcher, topics: Collection[str], on_hint: Callable[[], None] | None) -> None:
        self.topics = frozenset(topics)
        self._watcher, self._on_hint = watcher, on_hint
        self._hinted = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """True as soon as there is a hint since the last call returned True; False after `timeout_s` without one."""
        hinted = self._hinted.wait(timeout_s)
        if hinted:
            self._hinted.clear()
        return hinted

    def hint(self) -> None:
        """Wake the waiter."""
        self._hinted.set()
        if self._on_hint is not None:
            self._on_hint()

    def close(self) -> None:
        self._watcher.unsubscribe(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Watcher:
    """One thread that watches the database for all waiters of a process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._subscriptions: dict[Subscription, None] = {}
        self._lock = threading.Lock()
        self._somebody = threading.Event()
        self._closing = threading.Event()
        self.connected = True  # False: waiters rely on looking by themselves
        self._thread = threading.Thread(target=self._run, name="store-watcher", daemon=True)
        self._thread.start()

    def subscribe(self, *topics: str, on_hint: Callable[[], None] | None = None) -> Subscription:
        """Be told of changes under these topics from now on."""
        subscription = Subscription(self, topics, on_hint)
        with self._lock:
            self._subscriptions[subscription] = None
            self._somebody.set()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.pop(subscription, None)
            if not self._subscriptions and not self._closing.is_set():
                self._somebody.clear()

    def close(self) -> None:
        """Stop watching and wake all who wait."""
        self._closing.set()
        self._somebody.set()
        self._thread.join()
        self._tell(None)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with self._database.dedicated() as driver:
                    changes = self._sqlite_changes(driver) if self._database.is_sqlite else self._notices(driver)
                    for topics in changes:
                        self.connected = True
                        self._tell(topics)
            except StoreUnavailable as error:
                if self.connected:
                    _log.warning("the job store cannot be watched, waiters look by themselves: %s", error)
                self._pause()
            except Exception as error:  # whatever it is, nobody else would begin the watching again; said each time
                _log.error("watching the job store failed, it begins again", exc_info=error)
                self._pause()

    def _pause(self) -> None:
        self.connected = False
        self._closing.wait(_RECONNECT_S)

    def _tell(self, topics: Topics) -> None:
        with self._lock:
            told = [s for s in self._subscriptions if topics is None or not s.topics.isdisjoint(topics)]
        for subscription in told:
            try:
                subscription.hint()
            except Exception:  # a waiter's own function: its failure must not end the wake-ups of all others
                _log.exception("a waiter failed when it was woken, it is not woken any more")
                self.unsubscribe(subscription)

    def _sqlite_changes(self, driver: Any) -> Iterator[Topics]:  # Any: see Database.dedicated
        """Asks the file for its version every few milliseconds, while anybody waits. That takes microseconds."""
        seen = driver.execute("SELECT coalesce(max(id), 0) FROM hints").fetchone()[0]
        version = None
        yield None  # what changed before is not known
        while self._somebody.wait() and not self._closing.wait(_SQLITE_POLL_S):
            newest = driver.execute("PRAGMA data_version").fetchone()[0]
            if newest == version:
                continue
            version = newest
            rows = driver.execute(
                f"SELECT id, topic FROM hints WHERE id > ? ORDER BY id LIMIT {_BATCH}", (seen,)
            ).fetchall()
            if len(rows) == _BATCH:
                seen = driver.execute("SELECT max(id) FROM hints").fetchone()[0]
                yield None
            elif rows:
                seen = rows[-1][0]
                yield {topic for _, topic in rows}

    def _notices(self, driver: Any) -> Iterator[Topics]:
        driver.execute("LISTEN kontextd")
        yield None
        while not self._closing.is_set():
            for notice in driver.notifies(timeout=_POSTGRES_TURN_S, stop_after=1):
                yield {notice.payload}
