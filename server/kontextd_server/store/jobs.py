"""Jobs as their callers change them: submit, cancel, run again. Knows SQL and states; knows no HTTP and no workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import sqlalchemy as sa

from kontextd_server.store import topics
from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.records import (
    CANCELLED,
    CancelAnswer,
    JobState,
    NewJob,
    Outcome,
    Queued,
    Refusal,
    RetryAnswer,
    WebhookState,
)
from kontextd_server.store.settle import ENDED, SETTLED_COLUMNS, ending_values, settle
from kontextd_server.store.tables import BodyKind, bodies, idempotency_keys, jobs, webhooks
from kontextd_server.store.views import BEFORE_IN_QUEUE


class Jobs:
    """`owner` restricts a method to that owner's jobs: others are not found. None, the administrator, sees all."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock
        self._rows = database.statements.rows

    def enqueue(self, job: NewJob) -> Queued | Refusal:
        """Put the job into the queue, or say why not. A known idempotency key gives the job it made before."""
        now = self._clock()
        with self._database.write() as connection:
            self._database.serialise(connection, "enqueue")  # else parallel submits pass the limits together
            known = self._known(connection, job, now)
            if known is not None:
                return known
            (queue,) = self._rows(connection, _QUEUE, {"place": int(job.priority)})
            refusal = self._over_a_limit(connection, job, queue.waiting)
            if refusal is not None:
                return refusal
            self._insert(connection, job, now)
            self._database.hint(connection, topics.QUEUE)
        return Queued(job.request_id, queue.before)

    def request_cancel(self, request_id: str, *, owner: str | None = None) -> CancelAnswer:
        """A waiting job ends at once; a running one is marked, and its worker told at the next renewal."""
        now = self._clock()
        asked = {"wanted": request_id, "by": owner}
        with self._database.write() as connection:
            rows = self._rows(connection, _CANCEL, asked | ending_values(CANCELLED, now))
            if not rows:
                known = connection.execute(sa.select(jobs.c.id).where(_of(request_id, owner))).one_or_none()
                return CancelAnswer.ALREADY_COMPLETED if known else CancelAnswer.NOT_FOUND
            if rows[0].state is JobState.COMPLETED:
                settle(self._database, connection, rows[0], CANCELLED, now, self._policy)
        return CancelAnswer.ACCEPTED

    def retry(self, request_id: str, *, owner: str | None = None) -> RetryAnswer:
        """Queue a job again that failed or was cancelled, in its old place. Its webhook will be sent once more."""
        kept = sa.exists().where(
            bodies.c.job_id == jobs.c.id, bodies.c.kind == BodyKind.INPUT, bodies.c.expires_at.is_(None)
        )
        statement = (
            sa.update(jobs)
            .where(_of(request_id, owner), jobs.c.outcome.in_([Outcome.FAILED, Outcome.CANCELLED]), kept)
            .values(_AGAIN | {"runs_left": jobs.c.runs_allowed})
            .returning(jobs.c.id)
        )
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
            if row is None:
                found = connection.execute(sa.select(jobs.c.outcome).where(_of(request_id, owner))).one_or_none()
                return _why_not_again(found.outcome) if found else RetryAnswer.NOT_FOUND
            self._forget_ending(connection, row.id)
            self._database.hint(connection, topics.QUEUE, topics.job(request_id))
        return RetryAnswer.QUEUED

    def _known(self, connection: sa.Connection, job: NewJob, now: float) -> Queued | Refusal | None:
        if job.idempotency_key is None:
            return None
        row = connection.execute(
            sa.select(idempotency_keys.c.body_hash, jobs.c.id, jobs.c.request_id, jobs.c.state, jobs.c.priority)
            .join(jobs, jobs.c.id == idempotency_keys.c.job_id)
            .where(
                idempotency_keys.c.owner == job.owner,
                idempotency_keys.c.endpoint == job.endpoint,
                idempotency_keys.c.key == job.idempotency_key,
                idempotency_keys.c.expires_at > now,
            )
        ).one_or_none()
        if row is None:
            return None
        if row.body_hash != _body_hash(job):
            return Refusal.IDEMPOTENCY_KEY_REUSED
        waits = row.state is JobState.IN_QUEUE
        position = _position(connection, row.priority, row.id) if waits else 0
        return Queued(row.request_id, position, existing=True)

    def _over_a_limit(self, connection: sa.Connection, job: NewJob, waiting: int) -> Refusal | None:
        asked = job.max_queue_length
        limit = self._policy.max_queue_length if asked is None else min(asked, self._policy.max_queue_length)
        if waiting >= limit:
            return Refusal.QUEUE_FULL
        own_limit = self._policy.max_queued_per_owner
        if own_limit is not None:
            own = connection.execute(_WAITING.where(jobs.c.owner == job.owner)).scalar_one()
            return Refusal.OWNER_QUEUE_FULL if own >= own_limit else None
        return None

    def _insert(self, connection: sa.Connection, job: NewJob, now: float) -> None:
        runs = 1 if job.no_retry else self._policy.runs
        ((job_id,),) = self._rows(
            connection,
            _INSERT,
            {
                **{name: getattr(job, name) for name in _COPIED},
                "state": JobState.IN_QUEUE,
                "priority": int(job.priority),
                "created_at": now,
                "start_by": None if job.start_within_s is None else now + job.start_within_s,
                "attempt": 0,
                "runs_allowed": runs,
                "runs_left": runs,
                "cancel_requested": False,
            },
        )
        padding = self._database.padding(job.transient)
        self._rows(
            connection,
            _INSERT_INPUT,
            {"job_id": job_id, "kind": BodyKind.INPUT, "number": 0, "padding": padding, "body": job.payload},
        )
        if job.idempotency_key is not None:
            self._remember_key(connection, job, job_id, now)

    def _remember_key(self, connection: sa.Connection, job: NewJob, job_id: int, now: float) -> None:
        new = {"job_id": job_id, "body_hash": _body_hash(job), "expires_at": now + self._policy.idempotency_s}
        insert = self._database.insert(idempotency_keys).values(
            owner=job.owner, endpoint=job.endpoint, key=job.idempotency_key, **new
        )
        # One of that name may still be there, expired but not pruned yet.
        connection.execute(insert.on_conflict_do_update(index_elements=["owner", "endpoint", "key"], set_=new))

    def _forget_ending(self, connection: sa.Connection, job_id: int) -> None:
        connection.execute(sa.delete(bodies).where(bodies.c.job_id == job_id, bodies.c.kind == BodyKind.RESULT))
        connection.execute(
            sa.update(webhooks)
            .where(webhooks.c.job_id == job_id, webhooks.c.state == WebhookState.PENDING)
            .values(state=WebhookState.GIVEN_UP, last_error="the job was queued again", finished_at=self._clock())
        )


_COPIED = (
    *("request_id", "endpoint", "owner", "kind", "lora_key", "runner_hint"),
    *("transient", "webhook_url", "base_url", "tags", "files_expire_s", "key_id"),
)
_WAITING = sa.select(sa.func.count()).where(jobs.c.state == JobState.IN_QUEUE)
# How many wait, and how many of them are run before one that comes now.
_QUEUE = sa.select(
    sa.func.count().label("waiting"),
    sa.func.count().filter(jobs.c.priority <= sa.bindparam("place", type_=sa.Integer)).label("before"),
).where(jobs.c.state == JobState.IN_QUEUE)
_INSERT = sa.insert(jobs).returning(jobs.c.id)
_INSERT_INPUT = sa.insert(bodies)
_WAITS = jobs.c.state == JobState.IN_QUEUE
_BY = sa.bindparam("by", type_=jobs.c.owner.type)
_CANCEL = (
    sa.update(jobs)
    .where(
        jobs.c.request_id == sa.bindparam("wanted"),
        sa.or_(_BY.is_(None), jobs.c.owner == _BY),
        jobs.c.state != JobState.COMPLETED,
    )
    .values({name: sa.case((_WAITS, value), else_=jobs.c[name]) for name, value in ENDED.items()})
    .values(cancel_requested=True)
    .returning(*SETTLED_COLUMNS, jobs.c.state)
)
_AGAIN: dict[str, object] = {
    "state": JobState.IN_QUEUE,
    "outcome": None,
    "finished_at": None,
    "start_by": None,
    "cancel_requested": False,
    "steps_done": None,
    "steps_total": None,
    "error_type": None,
    "error_message": None,
    "http_status": None,
}


def _of(request_id: str, owner: str | None) -> sa.ColumnElement[bool]:
    condition = jobs.c.request_id == request_id
    return condition if owner is None else sa.and_(condition, jobs.c.owner == owner)


def _position(connection: sa.Connection, priority: int, job_id: int) -> int:
    return connection.execute(BEFORE_IN_QUEUE, {"place": int(priority), "number": job_id}).scalar_one()


def _body_hash(job: NewJob) -> str:
    return job.body_hash or hashlib.sha256(job.payload).hexdigest()


def _why_not_again(outcome: Outcome | None) -> RetryAnswer:
    return RetryAnswer.NOT_FAILED if outcome in (None, Outcome.OK) else RetryAnswer.INPUT_ERASED
