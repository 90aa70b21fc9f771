"""The job store as one thing: opened once a process, used from any thread. Knows its parts and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kontextd_server.store.database import Database
from kontextd_server.store.errors import StoreError
from kontextd_server.store.jobs import Jobs
from kontextd_server.store.keys import ApiKeys
from kontextd_server.store.leases import Leases
from kontextd_server.store.migrate import check_schema
from kontextd_server.store.policy import Policy
from kontextd_server.store.retention import Retention
from kontextd_server.store.views import Views
from kontextd_server.store.watch import Watcher
from kontextd_server.store.webhooks import Webhooks
from kontextd_server.store.workers import Workers


@dataclass(frozen=True)
class Store:
    """Every method of the parts blocks, for milliseconds as a rule: asynchronous code calls them in a thread.

    Any of them may raise `StoreUnavailable`.
    """

    database: Database
    policy: Policy
    clock: Callable[[], float]  # seconds since the epoch, by which leases and all else here are reckoned
    jobs: Jobs
    views: Views
    leases: Leases
    webhooks: Webhooks
    keys: ApiKeys
    workers: Workers
    retention: Retention

    def watch(self) -> Watcher:
        """A watcher for this process; close it before the store."""
        return Watcher(self.database)

    def close(self) -> None:
        self.database.close()


def open_store(url: str, policy: Policy | None = None, clock: Callable[[], float] | None = None) -> Store:
    """The store at a URL. Raises `SchemaMismatch` where `migrate` was not run, `UnsupportedDatabase` for other URLs."""
    database = Database(url)
    try:
        check_schema(database)
    except StoreError:
        database.close()
        raise
    return assemble(database, policy or Policy(), clock or database.clock)


def assemble(database: Database, policy: Policy, clock: Callable[[], float]) -> Store:
    """The parts over a database that is open already."""
    return Store(
        database=database,
        policy=policy,
        clock=clock,
        jobs=Jobs(database, policy, clock),
        views=Views(database, policy, clock),
        leases=Leases(database, policy, clock),
        webhooks=Webhooks(database, policy, clock),
        keys=ApiKeys(database, clock),
        workers=Workers(database, policy, clock),
        retention=Retention(database, policy, clock),
    )
