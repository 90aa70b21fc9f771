"""The statements of `leases`, built once: each names the state it comes from and, of a lease, the attempt.

Knows SQL; runs nothing. To build a statement takes longer than to run it.
"""

from __future__ import annotations

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.records import JobState
from kontextd_server.store.settle import ENDED, SETTLED_COLUMNS
from kontextd_server.store.tables import BodyKind, bodies, events, jobs

_RUNNING = jobs.c.state == JobState.IN_PROGRESS
_BACK_IN_QUEUE: dict[str, object] = {
    "state": JobState.IN_QUEUE,
    "lease_until": None,
    "steps_done": None,
    "steps_total": None,
}

_queued = jobs.alias("queued")
_MARGIN = 64  # more workers than ever claim in the same moment, each of which hides a row from the others


def _can_start(table: sa.FromClause) -> sa.ColumnElement[bool]:
    # A job that was started once has met its deadline.
    in_time = table.c.start_by > sa.bindparam("now", type_=sa.Double)
    return sa.and_(table.c.state == JobState.IN_QUEUE, sa.or_(table.c.start_by.is_(None), in_time, table.c.attempt > 0))


# A warm job counts as if it had come `window` jobs earlier, so it passes only those that came at most that many before.
# A bare comparison of ids needs no counter, and the bound holds for any number of workers. As no job that is further
# back than `window` can win, the rest of the queue is not looked at.
_WINDOW = sa.bindparam("window", type_=sa.Integer)
_WARM = sa.or_(jobs.c.lora_key == sa.bindparam("warm"), jobs.c.runner_hint == sa.bindparam("hint"))
_CLOSEST = sa.select(_queued.c.id).where(_can_start(_queued)).order_by(_queued.c.priority, _queued.c.id)
_NEXT = (
    sa.select(jobs.c.id)
    .where(jobs.c.id.in_(_CLOSEST.limit(_WINDOW + _MARGIN)), _can_start(jobs))
    .order_by(jobs.c.priority, sa.case((_WARM, jobs.c.id - _WINDOW), else_=jobs.c.id), jobs.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)  # left out on SQLite, where writers are alone
    .scalar_subquery()
)
# What a worker is told, see `records.Claim`.
_CLAIMED = (
    *("id", "attempt", "request_id", "endpoint", "owner", "kind", "lora_key", "runner_hint", "transient"),
    *("base_url", "created_at", "runs_left", "files_expire_s"),
)
CLAIM = (
    sa.update(jobs)
    .where(jobs.c.id == _NEXT, jobs.c.state == JobState.IN_QUEUE)
    .values(
        state=JobState.IN_PROGRESS,
        attempt=jobs.c.attempt + 1,
        runs_left=jobs.c.runs_left - 1,
        worker=sa.bindparam("by"),
        lease_until=sa.bindparam("until"),
        started_at=sa.bindparam("now", type_=sa.Double),
    )
    .returning(*(jobs.c[name] for name in _CLAIMED))
)
INPUT = sa.select(bodies.c.body).where(bodies.c.job_id == sa.bindparam("claimed"), bodies.c.kind == BodyKind.INPUT)

_HELD = sa.and_(jobs.c.id == sa.bindparam("held_job"), jobs.c.attempt == sa.bindparam("held_attempt"), _RUNNING)
RENEW = (
    sa.update(jobs)
    .where(_HELD)
    .values(lease_until=sa.bindparam("until"))
    .returning(jobs.c.request_id, jobs.c.cancel_requested, jobs.c.transient)
)
RENEW_AND_REPORT = RENEW.values(steps_done=sa.bindparam("done"), steps_total=sa.bindparam("total"))
RELEASE = (
    sa.update(jobs)
    .where(_HELD, ~jobs.c.cancel_requested)
    .values(_BACK_IN_QUEUE | {"runs_left": jobs.c.runs_left + 1})
    .returning(jobs.c.request_id)
)
_END = sa.update(jobs).values(ENDED).returning(*SETTLED_COLUMNS)
FINISH = _END.where(_HELD, ~jobs.c.cancel_requested)
FINISH_CANCELLED = _END.where(_HELD, jobs.c.cancel_requested)

# "dead" is NULL where no worker is known to be dead, and then equal to none.
_EXPIRED = jobs.c.lease_until <= sa.bindparam("now", type_=sa.Double)
_LOST = sa.and_(_RUNNING, sa.or_(_EXPIRED, jobs.c.worker == sa.bindparam("dead")))
_LOST_AND_WANTED = sa.and_(_LOST, ~jobs.c.cancel_requested)
END_CANCELLED = _END.where(_LOST, jobs.c.cancel_requested)
END_LOST = _END.where(_LOST_AND_WANTED, jobs.c.runs_left <= 0)
END_OVERDUE = _END.where(
    jobs.c.state == JobState.IN_QUEUE, jobs.c.start_by <= sa.bindparam("now", type_=sa.Double), jobs.c.attempt == 0
)
REQUEUE = (
    sa.update(jobs)
    .where(_LOST_AND_WANTED, jobs.c.runs_left > 0)
    .values(_BACK_IN_QUEUE)
    .returning(jobs.c.id, jobs.c.request_id, jobs.c.worker, jobs.c.runs_left)
)
LOG = sa.insert(events)


def upsert_preview(database: Database) -> sa.Executable:
    """Keep a preview in the place of the former."""
    insert = database.insert(bodies).values(
        job_id=sa.bindparam("of"),
        kind=BodyKind.PREVIEW,
        number=1,
        padding=sa.bindparam("padded"),
        body=sa.bindparam("picture"),
    )
    newer = {"body": insert.excluded.body, "number": bodies.c.number + 1}
    return insert.on_conflict_do_update(index_elements=["job_id", "kind"], set_=newer)
