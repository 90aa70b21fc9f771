"""What completes a job, within a transaction that the caller began. Knows no leases and no clock.

Statements are built once: building one takes longer than running it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from kontextd_server.store import topics
from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.prepared import Row
from kontextd_server.store.records import CANCELLED, Failure, JobState, Outcome, Success, WebhookState
from kontextd_server.store.tables import BodyKind, bodies, jobs, webhooks

Ending = Success | Failure

_MAX_MESSAGE = 2000  # characters; the whole of it is in the body


def _new(name: str) -> sa.BindParameter[Any]:  # Any: of the column's type
    return sa.bindparam(f"new_{name}", type_=jobs.c[name].type)


_OF_SUCCESS = ("inference_s", "images", "prompt_hit", "reference_hit", "lora_hit", "lora_load_s", "merge_s")
# The SET of each guarded statement that completes jobs; `ending_values` gives what it binds.
ENDED: dict[str, sa.ColumnElement[Any]] = {
    "state": sa.literal(JobState.COMPLETED, jobs.c.state.type),
    "lease_until": sa.null(),
    **{name: _new(name) for name in ("finished_at", "outcome", "error_type", "http_status", *_OF_SUCCESS)},
    # It may quote the caller: of a transient job nothing stays.
    "error_message": sa.case((jobs.c.transient, sa.null()), else_=_new("error_message")),
}
# What `settle` must be told of a job: let the guarded statement return these.
SETTLED_COLUMNS = (jobs.c.id, jobs.c.request_id, jobs.c.transient, jobs.c.webhook_url)

_OF_JOB = bodies.c.job_id == sa.bindparam("job")
_ERASE = sa.delete(bodies).where(_OF_JOB, bodies.c.kind == BodyKind.PREVIEW)
_ERASE_ALL = sa.delete(bodies).where(
    _OF_JOB, sa.or_(bodies.c.kind == BodyKind.PREVIEW, bodies.c.kind == BodyKind.INPUT)
)
_KEEP = sa.insert(bodies)
_TELL = sa.insert(webhooks)


def ending_values(ending: Ending, now: float) -> dict[str, object]:
    """What `ENDED` binds for a job that ends so."""
    values: dict[str, object] = {"finished_at": now}
    if isinstance(ending, Success):
        values |= {"outcome": Outcome.OK, "error_type": None, "http_status": None, "error_message": None}
        values |= {"inference_s": ending.inference_s, **asdict(ending.work)}
    else:
        values["outcome"] = Outcome.CANCELLED if ending is CANCELLED else Outcome.FAILED
        values |= {"error_type": ending.error_type, "http_status": ending.http_status}
        values |= {"error_message": ending.message[:_MAX_MESSAGE] or None, **dict.fromkeys(_OF_SUCCESS)}
    return {f"new_{name}": value for name, value in values.items()}


def settle(database: Database, connection: sa.Connection, row: Row, ending: Ending, now: float, policy: Policy) -> None:
    """Keep the result, erase what must not stay, put the webhook into the outbox and wake who waits."""
    run = database.statements.rows
    run(connection, _ERASE_ALL if row.transient else _ERASE, {"job": row.id})
    result = {
        "job_id": row.id,
        "kind": BodyKind.RESULT,
        "number": 0,
        "expires_at": now + policy.transient_result_s if row.transient else None,
        "padding": database.padding(row.transient),
        "body": ending.body,
    }
    run(connection, _KEEP, result)
    database.hint(connection, topics.job(row.request_id))
    if row.webhook_url is not None:
        webhook = {
            "job_id": row.id,
            "url": row.webhook_url,
            "state": WebhookState.PENDING,
            "attempt": 0,
            "next_at": now,
            "created_at": now,
        }
        run(connection, _TELL, webhook)
        database.hint(connection, topics.WEBHOOKS)
