"""What completes a job, within a transaction that the caller began. Knows no leases and no clock."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from kontextd_server.store import topics
from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.records import CANCELLED, Failure, JobState, Outcome, Success, WebhookState
from kontextd_server.store.tables import BodyKind, bodies, jobs, webhooks

# Any: SQLAlchemy types rows by their statement, and these come from several.
Row = sa.Row[*tuple[Any, ...]]
Ending = Success | Failure

# What `settle` must be told of a job: let the guarded statement return these.
SETTLED_COLUMNS = (jobs.c.id, jobs.c.request_id, jobs.c.transient, jobs.c.webhook_url)


def ending_values(ending: Ending, now: float) -> dict[str, object]:
    """The columns of a job that ends so: the SET of the guarded statement."""
    values: dict[str, object] = {"state": JobState.COMPLETED, "finished_at": now, "lease_until": None}
    if isinstance(ending, Success):
        return values | {"outcome": Outcome.OK, "inference_s": ending.inference_s}
    outcome = Outcome.CANCELLED if ending is CANCELLED else Outcome.FAILED
    return values | {"outcome": outcome, "error_type": ending.error_type, "http_status": ending.http_status}


def settle(database: Database, connection: sa.Connection, row: Row, ending: Ending, now: float, policy: Policy) -> None:
    """Keep the result, erase what must not stay, put the webhook into the outbox and wake who waits."""
    erased = [BodyKind.PREVIEW, BodyKind.INPUT] if row.transient else [BodyKind.PREVIEW]
    connection.execute(sa.delete(bodies).where(bodies.c.job_id == row.id, bodies.c.kind.in_(erased)))
    connection.execute(
        sa.insert(bodies).values(
            job_id=row.id,
            kind=BodyKind.RESULT,
            number=0,
            expires_at=now + policy.transient_result_s if row.transient else None,
            padding=database.padding(row.transient),
            body=ending.body,
        )
    )
    database.hint(connection, topics.job(row.request_id))
    if row.webhook_url is not None:
        connection.execute(
            sa.insert(webhooks).values(
                job_id=row.id,
                url=row.webhook_url,
                state=WebhookState.PENDING,
                attempt=0,
                next_at=now,
                created_at=now,
            )
        )
        database.hint(connection, topics.WEBHOOKS)
