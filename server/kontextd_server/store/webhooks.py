"""The outbox of webhooks: which are due and how they went. Knows SQL; posts nothing and renders nothing."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.readings import Delivery
from kontextd_server.store.records import WebhookState
from kontextd_server.store.tables import BodyKind, bodies, jobs, webhooks
from kontextd_server.store.views import job_columns, to_job

_PENDING = webhooks.c.state == WebhookState.PENDING


class Webhooks:
    """Rows come into the outbox in the transaction that completes their job. Their body is the job's result."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock

    def claim(self) -> Delivery | None:
        """A webhook that is due, for this caller to post. If nothing is heard of it, it is due again after a while."""
        now = self._clock()
        due = (
            sa.select(webhooks.c.id)
            .where(_PENDING, webhooks.c.next_at <= now)
            .order_by(webhooks.c.next_at, webhooks.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        statement = (
            sa.update(webhooks)
            .where(webhooks.c.id == due, _PENDING)
            .values(attempt=webhooks.c.attempt + 1, next_at=now + self._policy.webhook_lease_s)
            .returning(webhooks)
        )
        result = sa.and_(bodies.c.job_id == jobs.c.id, bodies.c.kind == BodyKind.RESULT)
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
            if row is None:
                return None
            job = connection.execute(
                sa.select(*job_columns(), bodies.c.body).outerjoin(bodies, result).where(jobs.c.id == row.job_id)
            ).one()
        return Delivery(row.id, row.attempt, row.url, row.created_at, to_job(job), job.body)

    def delivered(self, delivery: Delivery) -> bool:
        """It was taken. False if another process has it now, or had it delivered."""
        return self._end(delivery, WebhookState.DELIVERED, None)

    def failed(self, delivery: Delivery, error: str, *, retry_in_s: float | None) -> bool:
        """It was not taken: try again in so many seconds, or never. False as in `delivered`."""
        if retry_in_s is None:
            return self._end(delivery, WebhookState.GIVEN_UP, error)
        return self._change(delivery, {"next_at": self._clock() + retry_in_s, "last_error": error})

    def next_due_at(self) -> float | None:
        """When there is something to post, if nothing new comes."""
        with self._database.read() as connection:
            due: float | None = connection.execute(sa.select(sa.func.min(webhooks.c.next_at)).where(_PENDING)).scalar()
        return due

    def _end(self, delivery: Delivery, state: WebhookState, error: str | None) -> bool:
        return self._change(delivery, {"state": state, "last_error": error, "finished_at": self._clock()})

    def _change(self, delivery: Delivery, values: dict[str, object]) -> bool:
        claimed = (webhooks.c.id == delivery.id, webhooks.c.attempt == delivery.attempt, _PENDING)
        with self._database.write() as connection:
            return connection.execute(sa.update(webhooks).where(*claimed).values(values)).rowcount == 1
