"""Jobs as workers run them: claim, renew, finish, hand back; and what is done when a worker is lost.

Knows SQL, states and attempts; knows no images. Each method is one guarded statement: it names the state it comes from
and the attempt, and when it changes no row, that is the answer. A job may be run twice; it is finished once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa

from kontextd_server.store import topics
from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.records import (
    CANCELLED,
    NOT_STARTED_IN_TIME,
    WORKERS_LOST,
    Claim,
    FinishAnswer,
    JobState,
    Lease,
    LogLine,
    Outcome,
    Progress,
    Standing,
    Swept,
)
from kontextd_server.store.settle import SETTLED_COLUMNS, Ending, Row, ending_values, settle
from kontextd_server.store.tables import BodyKind, bodies, events, jobs

_RUNNING = jobs.c.state == JobState.IN_PROGRESS
_BACK_IN_QUEUE: dict[str, object] = {
    "state": JobState.IN_QUEUE,
    "lease_until": None,
    "steps_done": None,
    "steps_total": None,
}


class Leases:
    """What the worker processes call. `worker` is a worker's id."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock

    def claim(self, worker: str, *, warm_lora_key: str | None = None, runner_hint: str | None = None) -> Claim | None:
        """The job to run next, or None: by priority, then age, with the bounded preference for what is warm here."""
        now = self._clock()
        with self._database.write() as connection:
            row = connection.execute(
                _CLAIM,
                {
                    "now": now,
                    "until": now + self._policy.lease_s,
                    "by": worker,
                    "warm": warm_lora_key,
                    "hint": runner_hint,
                    "window": self._policy.affinity_window,
                },
            ).one_or_none()
            if row is None:
                return None
            payload = connection.execute(_INPUT, {"claimed": row.id}).scalar_one()
            self._database.hint(connection, topics.job(row.request_id))
        return _to_claim(row, payload)

    def renew(
        self,
        lease: Lease,
        *,
        logs: Sequence[LogLine] = (),
        progress: Progress | None = None,
        preview: bytes | None = None,
    ) -> Standing:
        """Prolong the lease and report what there is to report. A lease that was lost reports nothing."""
        values: dict[str, object] = {"lease_until": self._clock() + self._policy.lease_s}
        if progress is not None:
            values |= {"steps_done": progress.done, "steps_total": progress.total}
        returned = (jobs.c.request_id, jobs.c.cancel_requested, jobs.c.transient)
        with self._database.write() as connection:
            row = connection.execute(
                sa.update(jobs).where(*_held(lease)).values(values).returning(*returned)
            ).one_or_none()
            if row is None:
                return Standing.LOST
            self._log(connection, lease.job_id, logs)
            if preview is not None:
                self._keep_preview(connection, lease.job_id, preview, row.transient)
            if logs or progress is not None or preview is not None:
                self._database.hint(connection, topics.job(row.request_id))
        return Standing.CANCEL_REQUESTED if row.cancel_requested else Standing.HELD

    def finish(self, lease: Lease, ending: Ending, *, logs: Sequence[LogLine] = ()) -> FinishAnswer:
        """Record the result, its webhook with it. Where a cancel was accepted before, the job ends as cancelled."""
        now = self._clock()
        with self._database.write() as connection:
            for how, condition, answer in (
                (ending, ~jobs.c.cancel_requested, FinishAnswer.RECORDED),
                (CANCELLED, jobs.c.cancel_requested, FinishAnswer.CANCELLED),
            ):
                ended = self._end(connection, (*_held(lease), condition), how, now)
                if ended:
                    self._log(connection, lease.job_id, logs)
                    return FinishAnswer.CANCELLED if ending is CANCELLED else answer
            return _earlier_answer(connection, lease)

    def release(self, lease: Lease) -> bool:
        """Hand the job back unfinished, as if it had not been claimed; False if it was not held any more."""
        now = self._clock()
        requeue = (
            sa.update(jobs)
            .where(*_held(lease), ~jobs.c.cancel_requested)
            .values(_BACK_IN_QUEUE | {"runs_left": jobs.c.runs_left + 1})
            .returning(jobs.c.request_id)
        )
        with self._database.write() as connection:
            row = connection.execute(requeue).one_or_none()
            if row is None:
                return bool(self._end(connection, (*_held(lease), jobs.c.cancel_requested), CANCELLED, now))
            self._database.hint(connection, topics.QUEUE, topics.job(row.request_id))
        return True

    def sweep(self, *, lost_worker: str | None = None) -> Swept:
        """Take jobs from workers that let their lease expire, and fail those that waited too long to start.

        `lost_worker` is known to be dead: its jobs are taken at once.
        """
        now = self._clock()
        lost = (
            sa.or_(jobs.c.lease_until <= now, jobs.c.worker == lost_worker)
            if lost_worker
            else (jobs.c.lease_until <= now)
        )
        late = (jobs.c.state == JobState.IN_QUEUE, jobs.c.start_by <= now, jobs.c.attempt == 0)
        with self._database.write() as connection:
            self._database.serialise(connection, "sweep")  # two that take several rows each could block one another
            return Swept(
                cancelled=self._end(connection, (_RUNNING, lost, jobs.c.cancel_requested), CANCELLED, now),
                failed=self._end(
                    connection, (_RUNNING, lost, ~jobs.c.cancel_requested, jobs.c.runs_left <= 0), WORKERS_LOST, now
                ),
                requeued=self._requeue(connection, (_RUNNING, lost, ~jobs.c.cancel_requested), now),
                overdue=self._end(connection, late, NOT_STARTED_IN_TIME, now),
            )

    def _end(
        self, connection: sa.Connection, conditions: Iterable[sa.ColumnElement[bool]], ending: Ending, now: float
    ) -> tuple[str, ...]:
        statement = sa.update(jobs).where(*conditions).values(ending_values(ending, now))
        rows = connection.execute(statement.returning(*SETTLED_COLUMNS)).all()
        for row in rows:
            settle(self._database, connection, row, ending, now, self._policy)
        return tuple(row.request_id for row in rows)

    def _requeue(
        self, connection: sa.Connection, conditions: Iterable[sa.ColumnElement[bool]], now: float
    ) -> tuple[str, ...]:
        returned = (jobs.c.id, jobs.c.request_id, jobs.c.worker, jobs.c.runs_left)
        statement = sa.update(jobs).where(*conditions, jobs.c.runs_left > 0).values(_BACK_IN_QUEUE)
        rows = connection.execute(statement.returning(*returned)).all()
        for row in rows:
            message = f"The worker was lost. The request runs again; tries left: {row.runs_left}."
            self._log(connection, row.id, [LogLine(message, now, "WARN")])
            self._database.hint(connection, topics.QUEUE, topics.job(row.request_id))
        return tuple(row.request_id for row in rows)

    def _log(self, connection: sa.Connection, job_id: int, logs: Sequence[LogLine]) -> None:
        if logs:
            lines = [
                {"message": x.message, "timestamp": x.timestamp, "level": x.level, "source": x.source} for x in logs
            ]
            connection.execute(sa.insert(events), [line | {"job_id": job_id} for line in lines])

    def _keep_preview(self, connection: sa.Connection, job_id: int, preview: bytes, transient: bool) -> None:
        insert = self._database.insert(bodies).values(
            job_id=job_id, kind=BodyKind.PREVIEW, number=1, padding=self._database.padding(transient), body=preview
        )
        newer = {"body": insert.excluded.body, "number": bodies.c.number + 1}
        connection.execute(insert.on_conflict_do_update(index_elements=["job_id", "kind"], set_=newer))


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
_CLAIM = (
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
    .returning(jobs)
)
_INPUT = sa.select(bodies.c.body).where(bodies.c.job_id == sa.bindparam("claimed"), bodies.c.kind == BodyKind.INPUT)


def _held(lease: Lease) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.id == lease.job_id, jobs.c.attempt == lease.attempt, _RUNNING


def _earlier_answer(connection: sa.Connection, lease: Lease) -> FinishAnswer:
    """Why a lease cannot finish. A job keeps its attempt number when it completes, so it tells who completed it."""
    row = connection.execute(
        sa.select(jobs.c.outcome, jobs.c.error_type).where(
            jobs.c.id == lease.job_id, jobs.c.attempt == lease.attempt, jobs.c.state == JobState.COMPLETED
        )
    ).one_or_none()
    if row is None or row.error_type == WORKERS_LOST.error_type:
        return FinishAnswer.FENCED
    return FinishAnswer.CANCELLED if row.outcome is Outcome.CANCELLED else FinishAnswer.ALREADY_RECORDED


def _to_claim(row: Row, payload: bytes) -> Claim:
    return Claim(
        lease=Lease(row.id, row.attempt),
        request_id=row.request_id,
        endpoint=row.endpoint,
        owner=row.owner,
        kind=row.kind,
        payload=payload,
        lora_key=row.lora_key,
        runner_hint=row.runner_hint,
        transient=row.transient,
        base_url=row.base_url,
        created_at=row.created_at,
        runs_left=row.runs_left,
    )
