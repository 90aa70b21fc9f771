"""The queue: submit, status, status stream, result, cancel. Knows fal's calls; views over the store, nothing more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing
from functools import lru_cache

from fastapi import APIRouter
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kontextd_server.api import outcomes
from kontextd_server.api.documented import CANCEL, JSON_ERRORS, NOT_DONE, STATUS, STATUS_EVENTS
from kontextd_server.api.looks import Looker, looks
from kontextd_server.api.parts import Api
from kontextd_server.api.short_path import Handler
from kontextd_server.api.submission import submit
from kontextd_server.api.together import Together
from kontextd_server.store import CancelAnswer, JobKind
from kontextd_server.store.polls import JobStatus, Polls
from kontextd_server.wire import answers, statuses
from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.answers import QueueState
from kontextd_server.wire.endpoints import Action, Call
from kontextd_server.wire.errors import NotFound, UnknownRequest
from kontextd_server.wire.openapi import takes
from kontextd_server.wire.request_ids import REQUEST_ID_HEADER
from kontextd_server.wire.request_options import wants_logs
from kontextd_server.wire.schema import FluxKontextLoraInput, FluxKontextLoraOutput
from kontextd_server.wire.sse import EventStream
from kontextd_server.wire.statuses import CancelOutcome, RequestView
from kontextd_server.wire.virtual_hosts import context_of

# Polls wait so long for one another: a look at many jobs costs hardly more than one at a single job.
_LOOK_EVERY_S = 0.002


class QueueRoutes:
    """Handlers of the queue's calls."""

    def __init__(self, api: Api) -> None:
        self._api, self._polls = api, Polls(api.store.database)
        self._statuses: Together[str, JobStatus] = Together(self._look_up, _LOOK_EVERY_S)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["queue"])
        for endpoint in self._api.config.table:
            router.post(
                f"/queue/{endpoint.id}",
                response_model=answers.QueueSubmission,
                openapi_extra=takes(FluxKontextLoraInput),
                responses=JSON_ERRORS,
            )(self.submit)
        for app in sorted({endpoint.app for endpoint in self._api.config.table}):
            request = f"/queue/{app}/requests/{{request_id}}"
            router.get(request, response_model=FluxKontextLoraOutput, responses=NOT_DONE)(self.result)
            router.get(f"{request}/status", response_model=answers.QueueStatus, responses=STATUS)(self.status)
            router.get(f"{request}/status/stream", response_class=StreamingResponse, responses=STATUS_EVENTS)(
                self.status_stream
            )
            router.put(f"{request}/cancel", status_code=202, response_model=answers.CancelAnswer, responses=CANCEL)(
                self.cancel
            )
        return router

    @property
    def repeated(self) -> Mapping[Action, Handler]:
        """The calls that are worth a short path."""
        return {Action.SUBMIT: self.submit, Action.STATUS: self.status, Action.RESULT: self.result}

    async def submit(self, request: Request) -> Response:
        submitted = await submit(self._api, request, JobKind.QUEUE)
        view = RequestView(submitted.request_id, submitted.endpoint.app, QueueState.IN_QUEUE, submitted.queue_position)
        return _answer(200, statuses.submission(view, context_of(request).bases), submitted.request_id)

    async def status(self, request: Request, request_id: str, logs: str = "0") -> Response:
        looker = await self._looker(request)
        after = 0 if _wants_logs(request.scope["query_string"]) else None
        job = looker.visible(await self._statuses.get(looker.request_id))
        if looker.reads_more(job, after):
            look = await self._api.off_loop.read(looker.look, job, after)
        else:
            look = looker.look(job, after)
        code, body = statuses.status(look.view, context_of(request).bases, look.logs)
        return _answer(code, body, looker.request_id)

    async def status_stream(self, request: Request, request_id: str, logs: str = "0") -> Response:
        looker = await self._looker(request)
        events = self._status_events(looker, context_of(request).bases, wants_logs(request.query_params))
        headers = {REQUEST_ID_HEADER: looker.request_id}
        return EventStream(events, keep_alive_s=self._api.config.keep_alive_s, headers=headers)

    async def result(self, request: Request, request_id: str) -> Response:
        looker = await self._looker(request)
        return await self._api.off_loop.read(self._result, looker, context_of(request).bases)

    async def cancel(self, request: Request, request_id: str) -> Response:
        looker = await self._looker(request)
        outcome = await self._api.off_loop.write(self._cancel, looker)
        return _answer(*statuses.cancel(outcome), looker.request_id)

    async def _looker(self, request: Request) -> Looker:
        caller = await self._api.gate.caller(request)
        return Looker(self._api, self._polls, caller, _call(request))

    async def _look_up(self, request_ids: Collection[str]) -> Mapping[str, JobStatus]:
        return await self._api.off_loop.read(self._polls.statuses, request_ids)

    async def _status_events(self, looker: Looker, bases: Bases, logs: bool) -> AsyncIterator[Mapping[str, object]]:
        """Each change once; the lines of the log are told once as well, since the clients put them together."""
        cursor, told = 0, None
        async with aclosing(
            looks(self._api, looker.request_id, lambda: looker.status(cursor if logs else None))
        ) as all_looks:
            async for look in all_looks:
                if look.view != told or look.logs:
                    told = look.view
                    yield statuses.status(look.view, bases, look.logs)[1]
                cursor = look.logs[-1].cursor if look.logs else cursor
                if look.is_completed:
                    return

    def _result(self, looker: Looker, bases: Bases) -> Response:
        """In a thread to its last byte: results with pictures in them are large."""
        found = self._api.store.views.result(looker.request_id)
        if found is None:
            raise UnknownRequest(looker.request_id)
        looker.visible(found.job)
        told = outcomes.output(found, bases, with_report=self._api.config.with_report)
        return outcomes.response(told, looker.request_id)

    def _cancel(self, looker: Looker) -> CancelOutcome:
        try:
            looker.job()
        except UnknownRequest:
            return CancelOutcome.NOT_FOUND
        return _CANCELLED[self._api.store.jobs.request_cancel(looker.request_id)]


_CANCELLED = {
    CancelAnswer.ACCEPTED: CancelOutcome.CANCELLATION_REQUESTED,
    CancelAnswer.ALREADY_COMPLETED: CancelOutcome.ALREADY_COMPLETED,
    CancelAnswer.NOT_FOUND: CancelOutcome.NOT_FOUND,
}


@lru_cache(maxsize=16)
def _wants_logs(query: bytes) -> bool:
    """Of a status poll, whose few queries are sent again and again. Raises `BadRequest`."""
    return wants_logs(QueryParams(query))


def _call(request: Request) -> Call:
    call = context_of(request).call
    if call is None or call.request_id is None:
        raise NotFound(f"there is nothing at {request.url.path[:200]!r}.")
    return call


def _answer(status: int, body: Mapping[str, object], request_id: str) -> Response:
    return JSONResponse(body, status, {REQUEST_ID_HEADER: request_id})
