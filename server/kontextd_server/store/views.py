"""Jobs as they are read: status, place in the queue, log, result, lists. Knows SQL; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import sqlalchemy as sa

from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.prepared import Row
from kontextd_server.store.readings import Gauges, Job, JobFilter, JobReport, Preview, Result, WebhookReport
from kontextd_server.store.records import JobState, LogLine, Priority, WebhookState
from kontextd_server.store.tables import BodyKind, bodies, events, jobs, webhooks, workers

_FIELDS = tuple(field.name for field in fields(Job))
_COLUMNS = tuple(jobs.c[name] for name in _FIELDS if name != "queue_position")
_BATCH = 1000  # log lines a reader gets at once
_waiting, _listed, _ended = jobs.alias("waiting"), jobs.alias("listed"), jobs.alias("ended")


def _before(priority: sa.ColumnElement[int], job_id: sa.ColumnElement[int]) -> sa.Select[int]:
    return sa.select(sa.func.count()).where(
        _waiting.c.state == JobState.IN_QUEUE,
        sa.tuple_(_waiting.c.priority, _waiting.c.id) < sa.tuple_(priority, job_id),
    )


# How many jobs are to be run before one of this `place` and `number`, were there no preference for warm LoRA sets.
BEFORE_IN_QUEUE = _before(sa.bindparam("place", type_=sa.Integer), sa.bindparam("number", type_=sa.BigInteger))
_POSITION = sa.case(
    (jobs.c.state == JobState.IN_QUEUE, _before(jobs.c.priority, jobs.c.id).scalar_subquery()), else_=None
).label("queue_position")
_JOB = sa.select(*_COLUMNS, _POSITION)
# Built once, because clients poll: to build them takes longer than to run them.
_STATUS = _JOB.where(jobs.c.request_id == sa.bindparam("wanted"))
_RESULT = _STATUS.add_columns(bodies.c.body, bodies.c.expires_at).outerjoin(
    bodies, sa.and_(bodies.c.job_id == jobs.c.id, bodies.c.kind == BodyKind.RESULT)
)
_LOGS = (
    sa.select(events)
    .where(
        events.c.job_id == sa.select(jobs.c.id).where(jobs.c.request_id == sa.bindparam("wanted")).scalar_subquery(),
        events.c.id > sa.bindparam("after", type_=events.c.id.type),
    )
    .order_by(events.c.id)
    .limit(_BATCH)
)
_BODY = (
    sa.select(bodies.c.number, bodies.c.body)
    .join(jobs, jobs.c.id == bodies.c.job_id)
    .where(jobs.c.request_id == sa.bindparam("wanted"), bodies.c.kind == sa.bindparam("what"))
)


class Views:
    """What clients poll is an index look-up, however long the past; lists may take longer."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock
        self._rows = database.statements.rows

    def status(self, request_id: str) -> Job | None:
        """The job without its payloads. Whose it is says `Job.owner`."""
        with self._database.read() as connection:
            rows = self._rows(connection, _STATUS, {"wanted": request_id})
        return to_job(rows[0]) if rows else None

    def logs(self, request_id: str, *, after: int = 0) -> tuple[LogLine, ...]:
        """The lines after a cursor. Read them after the status: then those of a completed job are complete."""
        lines: list[LogLine] = []
        with self._database.read() as connection:
            while True:
                rows = self._rows(connection, _LOGS, {"wanted": request_id, "after": after})
                lines += [LogLine(row.message, row.timestamp, row.level, row.source, row.id) for row in rows]
                if len(rows) < _BATCH:
                    return tuple(lines)
                after = rows[-1].id

    def result(self, request_id: str) -> Result | None:
        """The job and what it left; see `Result`."""
        with self._database.read() as connection:
            rows = self._rows(connection, _RESULT, {"wanted": request_id})
        if not rows:
            return None
        (row,) = rows
        # An expired body may still be there, until a pruning or for the sake of a webhook.
        readable = row.expires_at is None or row.expires_at > self._clock()
        return Result(to_job(row), row.body if readable else None)

    def payload(self, request_id: str) -> bytes | None:
        """What was submitted, unless it is erased."""
        return self._body(request_id, BodyKind.INPUT)[1]

    def preview(self, request_id: str) -> Preview | None:
        """The newest preview of a running job."""
        number, body = self._body(request_id, BodyKind.PREVIEW)
        return None if body is None else Preview(number, body)

    def jobs(self, wanted: JobFilter | None = None, *, limit: int = 100) -> tuple[Job, ...]:
        """The newest first; for the next page, `before_id` is the id of the last one."""
        # The ids first: to sort whole rows of a long past, each with its place in the queue, would take a second.
        ids = sa.select(_listed.c.id).where(*_conditions(wanted or JobFilter())).order_by(_listed.c.id.desc())
        statement = _JOB.where(jobs.c.id.in_(ids.limit(limit))).order_by(jobs.c.id.desc())
        with self._database.read() as connection:
            return tuple(to_job(row) for row in connection.execute(statement))

    def report(self, request_id: str) -> JobReport | None:
        """What an operator is told of one job."""
        job = self.status(request_id)
        return None if job is None else JobReport(job, self._webhooks([job]).get(job.id))

    def reports(self, wanted: JobFilter | None = None, *, limit: int = 100) -> tuple[JobReport, ...]:
        """As `jobs`."""
        found = self.jobs(wanted, limit=limit)
        told = self._webhooks(found)
        return tuple(JobReport(job, told.get(job.id)) for job in found)

    def gauges(self) -> Gauges:
        """What waits and runs now, counted over the jobs that are not completed."""
        now = self._clock()
        oldest = sa.func.min(jobs.c.created_at).label("oldest")
        unfinished = (
            sa.select(jobs.c.state, jobs.c.priority, sa.func.count().label("n"), oldest)
            .where(jobs.c.state.in_([JobState.IN_QUEUE, JobState.IN_PROGRESS]))
            .group_by(jobs.c.state, jobs.c.priority)
        )
        pending = sa.select(sa.func.count()).where(webhooks.c.state == WebhookState.PENDING)
        live = (
            sa.select(workers.c.state, sa.func.count().label("n"))
            .where(workers.c.seen_at > now - self._policy.worker_silence_s)
            .group_by(workers.c.state)
        )
        with self._database.read() as connection:
            rows = connection.execute(unfinished).all()
            webhooks_pending = connection.execute(pending).scalar_one()
            states = {row.state: row.n for row in connection.execute(live)}
        queued = [row for row in rows if row.state is JobState.IN_QUEUE]
        return Gauges(
            queued={priority: sum(row.n for row in queued if row.priority == priority) for priority in Priority},
            running=sum(row.n for row in rows if row.state is JobState.IN_PROGRESS),
            oldest_queued_s=max((now - row.oldest for row in queued), default=0.0),
            webhooks_pending=webhooks_pending,
            workers=states,
        )

    def _webhooks(self, of: Sequence[Job]) -> dict[int, WebhookReport]:
        """The latest of each job: one that is run again makes another."""
        statement = sa.select(webhooks).where(webhooks.c.job_id.in_([job.id for job in of])).order_by(webhooks.c.id)
        with self._database.read() as connection:
            rows = connection.execute(statement).all()
        return {
            row.job_id: WebhookReport(row.state, row.attempt, row.next_at, row.last_error, row.finished_at)
            for row in rows
        }

    def _body(self, request_id: str, kind: BodyKind) -> tuple[int, bytes | None]:
        with self._database.read() as connection:
            rows = self._rows(connection, _BODY, {"wanted": request_id, "what": kind})
        return (rows[0].number, rows[0].body) if rows else (0, None)


def _conditions(wanted: JobFilter) -> Iterator[sa.ColumnElement[bool]]:
    ended_only = wanted.finished_after is not None
    for name in ("owner", "endpoint", "state", "outcome", "worker"):
        value = getattr(wanted, name)
        # Said twice, it would make SQLite walk through all that is completed instead of what was completed lately.
        if value is not None and not (ended_only and value is JobState.COMPLETED):
            yield _listed.c[name] == value
    if ended_only:
        yield _listed.c.id.in_(sa.select(_ended.c.id).where(_ended.c.finished_at > wanted.finished_after))
    if wanted.before_id is not None:
        yield _listed.c.id < wanted.before_id


def job_columns() -> tuple[sa.ColumnElement[object], ...]:
    """What `to_job` reads, but for the queue position."""
    return _COLUMNS


def to_job(row: Row) -> Job:
    values = {name: getattr(row, name, None) for name in _FIELDS}
    # Each value has the type of its column, which is that of its field.
    return Job(**values | {"priority": Priority(row.priority)})  # type: ignore[arg-type]
