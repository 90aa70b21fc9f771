"""The register of workers: who is there and what each does. Knows SQL; starts and stops nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.records import Worker
from kontextd_server.store.tables import workers


class Workers:
    """Each worker writes its own row every few seconds. Leases do not depend on it: it is there to be looked at."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock

    def beat(self, worker: Worker) -> None:
        """Here I am, and this is what I do."""
        now = self._clock()
        told = {name: getattr(worker, name) for name in _TOLD}
        insert = self._database.insert(workers).values(id=worker.id, **told, started_at=now, seen_at=now)
        with self._database.write() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["id"], set_=told | {"seen_at": now}))

    def leave(self, worker_id: str) -> None:
        """It has ended in good order."""
        with self._database.write() as connection:
            connection.execute(sa.delete(workers).where(workers.c.id == worker_id))

    def live(self) -> tuple[Worker, ...]:
        """Those that were heard of lately."""
        heard = workers.c.seen_at > self._clock() - self._policy.worker_silence_s
        return self._listed(sa.select(workers).where(heard))

    def all(self) -> tuple[Worker, ...]:
        """Silent ones too, until they are pruned."""
        return self._listed(sa.select(workers))

    def _listed(self, statement: sa.Select[tuple[object, ...]]) -> tuple[Worker, ...]:
        with self._database.read() as connection:
            rows = connection.execute(statement.order_by(workers.c.started_at, workers.c.id)).all()
        # The columns are named after the fields, and typed like them.
        return tuple(Worker(**row._mapping) for row in rows)


_TOLD = tuple(field.name for field in fields(Worker) if field.name not in ("id", "started_at", "seen_at"))
