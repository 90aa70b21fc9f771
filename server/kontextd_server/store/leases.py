"""Jobs as workers run them: claim, renew, finish, hand back; and what is done when a worker is lost.

Knows SQL, states and attempts; knows no images. Each method is one guarded statement: it names the state it comes from
and the attempt, and when it changes no row, that is the answer. A job may be run twice; it is finished once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from kontextd_server.store import lease_statements as sql
from kontextd_server.store import topics
from kontextd_server.store.database import Database
from kontextd_server.store.policy import Policy
from kontextd_server.store.prepared import Row, Statement, Values
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
from kontextd_server.store.settle import Ending, ending_values, settle
from kontextd_server.store.tables import jobs


class Leases:
    """What the worker processes call. `worker` is a worker's id."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float]) -> None:
        self._database, self._policy, self._clock = database, policy, clock
        self._rows, self._each = database.statements.rows, database.statements.each
        self._upsert_preview = sql.upsert_preview(database)

    def claim(self, worker: str, *, warm_lora_key: str | None = None, runner_hint: str | None = None) -> Claim | None:
        """The job to run next, or None: by priority, then age, with the bounded preference for what is warm here."""
        now = self._clock()
        with self._database.write() as connection:
            claimed = self._rows(
                connection,
                sql.CLAIM,
                {
                    "now": now,
                    "until": now + self._policy.lease_s,
                    "by": worker,
                    "warm": warm_lora_key,
                    "hint": runner_hint,
                    "window": self._policy.affinity_window,
                },
            )
            if not claimed:
                return None
            (row,) = claimed
            (found,) = self._rows(connection, sql.INPUT, {"claimed": row.id})
            self._database.hint(connection, topics.job(row.request_id))
        return _to_claim(row, found.body)

    def renew(
        self,
        lease: Lease,
        *,
        logs: Sequence[LogLine] = (),
        progress: Progress | None = None,
        preview: bytes | None = None,
    ) -> Standing:
        """Prolong the lease and report what there is to report. A lease that was lost reports nothing."""
        values: dict[str, object] = {**_of(lease), "until": self._clock() + self._policy.lease_s}
        if progress is not None:
            values |= {"done": progress.done, "total": progress.total}
        with self._database.write() as connection:
            renewed = self._rows(connection, sql.RENEW if progress is None else sql.RENEW_AND_REPORT, values)
            if not renewed:
                return Standing.LOST
            (row,) = renewed
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
            for statement, how, answer in (
                (sql.FINISH, ending, FinishAnswer.RECORDED),
                (sql.FINISH_CANCELLED, CANCELLED, FinishAnswer.CANCELLED),
            ):
                if self._end(connection, statement, _of(lease), how, now):
                    self._log(connection, lease.job_id, logs)
                    return FinishAnswer.CANCELLED if ending is CANCELLED else answer
            return _earlier_answer(connection, lease)

    def release(self, lease: Lease) -> bool:
        """Hand the job back unfinished, as if it had not been claimed; False if it was not held any more."""
        now = self._clock()
        with self._database.write() as connection:
            row = connection.execute(sql.RELEASE, _of(lease)).one_or_none()
            if row is None:
                return bool(self._end(connection, sql.FINISH_CANCELLED, _of(lease), CANCELLED, now))
            self._database.hint(connection, topics.QUEUE, topics.job(row.request_id))
        return True

    def sweep(self, *, lost_worker: str | None = None, expired_by: float | None = None) -> Swept:
        """Take jobs from workers that let their lease expire, and fail those that waited too long to start.

        `lost_worker` is known to be dead: its jobs are taken at once. A lease expired if it ended at `expired_by`, or
        before; None is now.
        """
        now = self._clock()
        whose = {"now": now if expired_by is None else expired_by, "dead": lost_worker}
        with self._database.write() as connection:
            self._database.serialise(connection, "sweep")  # two that take several rows each could block one another
            return Swept(
                cancelled=self._end(connection, sql.END_CANCELLED, whose, CANCELLED, now),
                failed=self._end(connection, sql.END_LOST, whose, WORKERS_LOST, now),
                requeued=self._requeue(connection, whose, now),
                overdue=self._end(connection, sql.END_OVERDUE, {"now": now}, NOT_STARTED_IN_TIME, now),
            )

    def _end(
        self, connection: sa.Connection, statement: Statement, whose: Values, ending: Ending, now: float
    ) -> tuple[str, ...]:
        rows = self._rows(connection, statement, {**whose, **ending_values(ending, now)})
        for row in rows:
            settle(self._database, connection, row, ending, now, self._policy)
        return tuple(row.request_id for row in rows)

    def _requeue(self, connection: sa.Connection, whose: Values, now: float) -> tuple[str, ...]:
        rows = self._rows(connection, sql.REQUEUE, whose)
        for row in rows:
            message = f"The worker was lost. The request runs again; tries left: {row.runs_left}."
            self._log(connection, row.id, [LogLine(message, now, "WARN")])
            self._database.hint(connection, topics.QUEUE, topics.job(row.request_id))
        return tuple(row.request_id for row in rows)

    def _log(self, connection: sa.Connection, job_id: int, logs: Sequence[LogLine]) -> None:
        if logs:
            lines = [
                {"job_id": job_id, "message": x.message, "timestamp": x.timestamp, "level": x.level, "source": x.source}
                for x in logs
            ]
            self._each(connection, sql.LOG, lines)

    def _keep_preview(self, connection: sa.Connection, job_id: int, preview: bytes, transient: bool) -> None:
        values = {"of": job_id, "padded": self._database.padding(transient), "picture": preview}
        connection.execute(self._upsert_preview, values)


def _of(lease: Lease) -> Values:
    return {"held_job": lease.job_id, "held_attempt": lease.attempt}


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
        files_expire_s=row.files_expire_s,
    )
