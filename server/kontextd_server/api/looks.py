"""How a job is looked at: by whom, once or until it ends. Knows owners and apps; renders nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kontextd_server.api.parts import Api
from kontextd_server.store import JobState, LogLine, Outcome, StoreUnavailable, topics
from kontextd_server.store.polls import JobStatus, Polls
from kontextd_server.wire.answers import QueueState
from kontextd_server.wire.auth import Identity
from kontextd_server.wire.endpoints import Call
from kontextd_server.wire.error_table import kept_answer
from kontextd_server.wire.errors import UnknownRequest
from kontextd_server.wire.statuses import RequestView

log = logging.getLogger(__name__)

T = TypeVar("T")


class Owned(Protocol):
    """Any record of a job."""

    @property
    def endpoint(self) -> str: ...

    @property
    def owner(self) -> str: ...


OwnedT = TypeVar("OwnedT", bound=Owned)


@dataclass(frozen=True)
class Look:
    """A job at one moment. `logs` holds the lines after those that were seen; None: they were not asked for."""

    view: RequestView
    logs: tuple[LogLine, ...] | None = None

    @property
    def is_completed(self) -> bool:
        return self.view.state is QueueState.COMPLETED


class Looker:
    """Looks for one caller, at one request of one app. What reads the store blocks.

    A request of another owner, or of another app, is as unknown as one that never was.
    """

    def __init__(self, api: Api, polls: Polls, caller: Identity, call: Call) -> None:
        self._views, self._polls, self._caller, self._app = api.store.views, polls, caller, call.app
        self.request_id = call.request_id or ""

    def job(self) -> JobStatus:
        """Raises `UnknownRequest`."""
        return self.visible(self._polls.statuses([self.request_id]).get(self.request_id))

    def visible(self, job: OwnedT | None) -> OwnedT:
        """The job, where this caller may see it. Raises `UnknownRequest`."""
        if job is None or not self._may_see(job):
            raise UnknownRequest(self.request_id)
        return job

    def status(self, logs_after: int | None) -> Look:
        """With the log after a cursor, where asked for."""
        return self.look(self.job(), logs_after)

    def look(self, job: JobStatus, logs_after: int | None) -> Look:
        """The same for a job that was read a moment ago. The log is read now, so that a finished one is complete."""
        lines = self._views.logs(self.request_id, after=logs_after or 0) if _has_log(job, logs_after) else ()
        return Look(self._view(job), None if logs_after is None else lines)

    def reads_more(self, job: JobStatus, logs_after: int | None) -> bool:
        """Whether `look` asks the store for anything."""
        return _has_log(job, logs_after) or _has_failed(job)

    def _may_see(self, job: Owned) -> bool:
        is_of_app = job.endpoint == self._app or job.endpoint.startswith(f"{self._app}/")
        return is_of_app and self._caller.may_see(job.owner)

    def _view(self, job: JobStatus) -> RequestView:
        return RequestView(
            request_id=job.request_id,
            app=self._app,
            state=QueueState(job.state.value),
            queue_position=job.queue_position or 0,
            inference_time_s=job.inference_s,
            error=self._error(job),
            error_type=job.error_type,
        )

    def _error(self, job: JobStatus) -> str | None:
        if not _has_failed(job):
            return None
        found = self._views.result(job.request_id)
        if found is None or found.body is None:
            return f"the request failed: {job.error_type}"
        return kept_answer(job.http_status or 500, job.error_type or "", found.body).message


def _has_log(job: JobStatus, logs_after: int | None) -> bool:
    return logs_after is not None and job.state is not JobState.IN_QUEUE


def _has_failed(job: JobStatus) -> bool:
    return job.outcome not in (None, Outcome.OK)


async def looks(api: Api, request_id: str, look: Callable[[], T]) -> AsyncGenerator[T, None]:
    """What `look` sees now, and each time that something may have changed; whoever iterates decides when to stop.

    A store that does not answer is waited for: what was accepted must not be answered by "not accepted".
    """
    is_away = False
    with api.wakeups.on(topics.job(request_id)) as wake:
        while True:
            api.drain.check_not_over()
            try:
                seen = await api.off_loop.read(look)
            except StoreUnavailable as error:
                if not is_away:
                    log.warning("request %s: its state cannot be read, trying again: %s", request_id, error)
                is_away = True
            else:
                is_away = False
                yield seen
            await wake.wait()
