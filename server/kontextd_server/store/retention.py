"""What is removed, and when. Knows SQL and ages; decides nothing about jobs that are not completed."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.records import JobState, Pruned, WebhookState
from kontextd_server.store.tables import bodies, hints, idempotency_keys, jobs, webhooks, workers

_BATCH = 200  # jobs a transaction removes, so that writers never wait long
_HINTS_KEPT = 1000


class Retention:
    """`prune` is to be called once a minute or so by any process; calling it in several does no harm."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock

    def expire(self, request_id: str) -> None:
        """The result has been delivered and is not to be read again; the next pruning erases it with its input."""
        job_id = sa.select(jobs.c.id).where(jobs.c.request_id == request_id, jobs.c.state == JobState.COMPLETED)
        with self._database.write() as connection:
            connection.execute(
                sa.update(bodies).where(bodies.c.job_id == job_id.scalar_subquery()).values(expires_at=self._clock())
            )

    def prune(self) -> Pruned:
        """Remove what is past its time and leave no byte of it in the files, see `Database.forget_erased`."""
        now = self._clock()
        with self._database.write() as connection:
            self._database.serialise(connection, "sweep")
            erased = _rows(connection, sa.delete(bodies).where(bodies.c.expires_at <= now, ~_webhook_pending(bodies)))
            keys = _rows(connection, sa.delete(idempotency_keys).where(idempotency_keys.c.expires_at <= now))
            lost = workers.c.seen_at <= now - self._policy.lost_workers_s
            gone = _rows(connection, sa.delete(workers).where(lost))
            newest = sa.select(sa.func.max(hints.c.id)).scalar_subquery()
            connection.execute(sa.delete(hints).where(hints.c.id <= newest - _HINTS_KEPT))
        removed = self._remove_old_jobs(now - self._policy.finished_jobs_s)
        return Pruned(erased, removed, keys, gone, bytes_gone=self._database.forget_erased())

    def _remove_old_jobs(self, before: float) -> int:
        old = (
            sa.select(jobs.c.id)
            .where(jobs.c.finished_at <= before, ~_webhook_pending(jobs))
            .order_by(jobs.c.finished_at)
            .limit(_BATCH)
        )
        removed = 0
        while True:
            with self._database.write() as connection:
                self._database.serialise(connection, "sweep")
                # Payloads, log lines, keys and webhooks go with their job.
                batch = _rows(connection, sa.delete(jobs).where(jobs.c.id.in_(old)))
            removed += batch
            if batch < _BATCH:
                return removed


def _webhook_pending(table: sa.Table) -> sa.ColumnElement[bool]:
    """A webhook of this job is still to be delivered: it needs the result."""
    job_id = table.c.id if table is jobs else table.c.job_id
    return sa.exists().where(webhooks.c.job_id == job_id, webhooks.c.state == WebhookState.PENDING)


def _rows(connection: sa.Connection, statement: sa.Delete) -> int:
    return connection.execute(statement).rowcount
