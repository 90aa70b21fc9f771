"""Server-sent events as fal's clients read them. Knows framing, keep-alives and how a stream fails; knows no events.

Before anything is sent an error is an ordinary answer. After that it is an event, and then the connection is broken off
without the chunk that ends a body: on a clean end JavaScript's `done()` resolves with the error as if it were the
result, on a broken one it rejects, and Python raises. The ASGI way to break off is to return with the body unfinished:
uvicorn then closes the connection once what was written is sent (and logs one line; h11 and httptools alike).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kontextd_server.wire.error_table import answer
from kontextd_server.wire.request_ids import request_id_of

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: object) -> bytes:
    """One event. Its JSON is ASCII: JavaScript's client decodes chunk by chunk, and a character split between two
    chunks comes out broken. Raises `ValueError` for NaN and Infinity."""
    return f"data: {json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(',', ':'))}\n\n".encode("ascii")


class EventStream(Response):
    """Sends each element of `events` as an event. The iterator is closed when the client goes away, and at the end.

    If the first element takes longer than `keep_alive_s`, the stream begins with a comment; an error after that can no
    longer be an ordinary answer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, object]],
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.events, self.keep_alive_s = events, keep_alive_s
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering: nginx holds events back otherwise.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_client_gone(receive))
        try:
            await _Sending(self, send).run(gone, request_id_of(Request(scope)))
        finally:
            gone.cancel()
            await _close(self.events)


class _Sending:
    """One stream under way."""

    def __init__(self, stream: EventStream, send: Send) -> None:
        self.stream, self.send = stream, send
        self.started = False

    async def run(self, gone: asyncio.Future[None], request_id: str) -> None:
        while True:
            pending = asyncio.ensure_future(_next(self.stream.events))
            try:
                if not await self._wait(pending, gone):
                    return
                data = event(pending.result())
            except StopAsyncIteration:
                await self._write(b"", more=False)
                return
            except Exception as error:
                if not self.started:
                    raise
                await self._break_off(error, request_id)
                return
            finally:
                await _end(pending)
            await self._write(data)

    async def _wait(self, pending: asyncio.Future[Mapping[str, object]], gone: asyncio.Future[None]) -> bool:
        """Wait for the next event, with a comment from time to time. False: the client has gone away."""
        both: set[asyncio.Future[Any]] = {pending, gone}  # Any: nothing is read from them here
        while not pending.done():
            await asyncio.wait(both, timeout=self.stream.keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return False
            if not pending.done():
                await self._write(KEEP_ALIVE)
        return True

    async def _break_off(self, error: Exception, request_id: str) -> None:
        told = answer(error)
        log.log(
            logging.ERROR if told.status >= 500 else logging.INFO,
            "request %s: stream broken off: %s",
            request_id,
            told.error_type,
            exc_info=error if told.status >= 500 else None,
        )
        await self._write(event(told.body))

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await self.send(
                {"type": "http.response.start", "status": self.stream.status_code, "headers": self.stream.raw_headers}
            )
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


async def _next(events: AsyncIterator[Mapping[str, object]]) -> Mapping[str, object]:
    return await anext(events)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(pending: asyncio.Future[Mapping[str, object]]) -> None:
    """Stop a waiting iterator before it is closed: a running one cannot be."""
    if not pending.done():
        pending.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            await pending


async def _close(events: AsyncIterator[Mapping[str, object]]) -> None:
    close = getattr(events, "aclose", None)  # generators have it, plain iterators need not
    if close is not None:
        await close()
