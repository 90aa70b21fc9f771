"""Sync run and stream: a job like any other, with the response held open. Knows when a job is to be cancelled."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from fastapi import APIRouter
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from kontextd_server.api import outcomes
from kontextd_server.api.documented import JSON_ERRORS, OUTPUT_EVENTS
from kontextd_server.api.looks import looks
from kontextd_server.api.parts import Api
from kontextd_server.api.short_path import Handler
from kontextd_server.api.submission import Submitted, submit
from kontextd_server.store import JobKind, JobState, Preview, StoreUnavailable
from kontextd_server.wire.addresses import Bases
from kontextd_server.wire.endpoints import Action
from kontextd_server.wire.error_table import ErrorAnswer
from kontextd_server.wire.errors import Cancelled, UnknownRequest
from kontextd_server.wire.openapi import takes
from kontextd_server.wire.outputs import StoredImage, StoredOutput
from kontextd_server.wire.request_ids import REQUEST_ID_HEADER
from kontextd_server.wire.schema import FluxKontextLoraInput, FluxKontextLoraOutput
from kontextd_server.wire.sse import EventStream
from kontextd_server.wire.virtual_hosts import context_of

log = logging.getLogger(__name__)


Told = dict[str, object] | ErrorAnswer


@dataclass(frozen=True)
class _Glimpse:
    """`told` once the job has ended; before that its preview, where it is a new one."""

    told: Told | None = None
    preview_number: int = 0
    preview: Mapping[str, object] | None = None


class RunRoutes:
    """Handlers of the two calls that wait."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def router(self) -> APIRouter:
        router = APIRouter(tags=["run"])
        body = takes(FluxKontextLoraInput)
        for endpoint in self._api.config.table:
            path = f"/{endpoint.id}"
            router.post(path, response_model=FluxKontextLoraOutput, openapi_extra=body, responses=JSON_ERRORS)(self.run)
            router.post(
                f"{path}/stream",
                response_class=StreamingResponse,
                openapi_extra=body,
                responses={**JSON_ERRORS, **OUTPUT_EVENTS},
            )(self.stream)
        return router

    @property
    def repeated(self) -> Mapping[Action, Handler]:
        """The call that is worth a short path."""
        return {Action.RUN: self.run}

    async def run(self, request: Request) -> Response:
        submitted = await submit(self._api, request, JobKind.RUN)
        bases = context_of(request).bases
        async with self._cancelled_unless_ended(submitted):
            ended = asyncio.ensure_future(self._ended(submitted, bases))
            gone = asyncio.ensure_future(_client_gone(request))
            try:
                await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
                if not ended.done():
                    raise Cancelled("the client went away before its request was done.")
                response = ended.result()
            finally:
                await _stop(ended, gone)
        await self._forget(submitted)
        return response

    async def stream(self, request: Request) -> Response:
        submitted = await submit(self._api, request, JobKind.STREAM)
        return EventStream(
            self._events(submitted, context_of(request).bases),
            keep_alive_s=self._api.config.keep_alive_s,
            headers={REQUEST_ID_HEADER: submitted.request_id},
        )

    async def _events(self, submitted: Submitted, bases: Bases) -> AsyncIterator[Mapping[str, object]]:
        """Previews, then the output. What the job failed with is raised."""
        seen = 0
        told: Told | None = None
        async with (
            self._cancelled_unless_ended(submitted),
            aclosing(looks(self._api, submitted.request_id, lambda: self._glimpse(submitted, bases, seen))) as glimpses,
        ):
            async for glimpse in glimpses:
                if glimpse.told is not None:
                    told = glimpse.told
                    break
                if glimpse.preview is not None:
                    seen = glimpse.preview_number
                    yield glimpse.preview
        await self._forget(submitted)
        if isinstance(told, ErrorAnswer):
            raise outcomes.error_of(told)
        if told is not None:
            yield told

    async def _ended(self, submitted: Submitted, bases: Bases) -> Response:
        look = partial(self._response, submitted, bases)
        async with aclosing(looks(self._api, submitted.request_id, look)) as responses:
            async for response in responses:
                if response is not None:
                    return response
        raise AssertionError("looking ended by itself")

    @asynccontextmanager
    async def _cancelled_unless_ended(self, submitted: Submitted) -> AsyncIterator[None]:
        """Whatever ends the waiting before the job has ended: the client, the end of the process, a bug."""
        try:
            yield
        except BaseException:
            if not submitted.is_shared:
                await self._cancel(submitted.request_id)
            raise

    async def _cancel(self, request_id: str) -> None:
        try:
            await self._api.off_loop.write(self._api.store.jobs.request_cancel, request_id)
        except StoreUnavailable as error:  # it runs to its end, for nobody
            log.warning("request %s could not be cancelled: %s", request_id, error)

    async def _forget(self, submitted: Submitted) -> None:
        """A result that nobody may read a second time."""
        if submitted.transient and not submitted.is_shared:
            with suppress(StoreUnavailable):  # it goes a little later, by its time
                await self._api.off_loop.write(self._api.store.retention.expire, submitted.request_id)

    # In threads, to the last byte: results with pictures in them are large.

    def _told(self, submitted: Submitted, bases: Bases) -> Told | None:
        """What the job ended with; None before it has."""
        views = self._api.store.views
        job = views.status(submitted.request_id)
        found = views.result(submitted.request_id) if job is not None and job.state is JobState.COMPLETED else None
        if found is not None:
            return outcomes.output(found, bases, with_report=self._api.config.with_report)
        if job is None:
            raise UnknownRequest(submitted.request_id)
        return None

    def _response(self, submitted: Submitted, bases: Bases) -> Response | None:
        told = self._told(submitted, bases)
        return None if told is None else outcomes.response(told, submitted.request_id)

    def _glimpse(self, submitted: Submitted, bases: Bases, seen: int) -> _Glimpse:
        told = self._told(submitted, bases)
        preview = self._api.store.views.preview(submitted.request_id) if told is None else None
        if preview is None or preview.number <= seen:
            return _Glimpse(told)
        return _Glimpse(None, preview.number, _preview_event(submitted, preview, bases))


def _preview_event(submitted: Submitted, preview: Preview, bases: Bases) -> Mapping[str, object]:
    """A preview in the output's shape."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(preview.body).decode('ascii')}"
    with Image.open(BytesIO(preview.body)) as opened:
        width, height = opened.size
    image = StoredImage(width, height, "image/jpeg", "preview.jpeg", len(preview.body), data_uri=uri)
    wanted = submitted.wanted
    return StoredOutput((image,), {}, wanted.seed or 0, (False,), wanted.prompt).render(bases)


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Future[Any]) -> None:  # Any: nothing is read from them
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
