"""A line of the log, and a count, for each call. Logs no keys, no queries and no bodies: it knows none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kontextd_server.api.metrics import CallMetrics
from kontextd_server.wire.request_ids import REQUEST_ID_HEADER

log = logging.getLogger(__name__)

_SEEN = "kontextd.seen"
_OTHER = "other"
# Asked all the time: at INFO they would bury everything else.
_QUIET = frozenset({"health", "ready", "metrics", "status"})


class CallLog:
    """Outermost: logs and counts every answer, by the name of its route. A path may hold a grant, so none is logged."""

    def __init__(self, app: ASGIApp, metrics: CallMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, seen, answer = time.perf_counter(), _Seen(), _Answer()

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], message["headers"]
            await send(message)

        try:
            await self._app({**scope, _SEEN: seen}, receive, send_noted)
        finally:
            self._note(scope["method"], seen.call, answer, time.perf_counter() - began)

    def _note(self, method: str, call: str, answer: _Answer, seconds: float) -> None:
        self._metrics.answered(call, answer.status, seconds)
        level = logging.DEBUG if call in _QUIET and answer.status < 500 else logging.INFO
        if log.isEnabledFor(level):
            told = "%s %s %d in %.3f s, request %s"
            known = (method, call, answer.status, seconds, answer.request_id)
            fields = ("method", "call", "status", "duration_s", "request_id")
            log.log(level, told, *known, extra=dict(zip(fields, known, strict=True)))


class RouteNames:
    """Innermost: tells `CallLog` which route answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            route: Any = scope.get("route")  # Any: Starlette's routes have no name in common
            if _SEEN in scope and route is not None:
                scope[_SEEN].call = getattr(route, "name", _OTHER)


def name_call(scope: Scope, handler: Callable[..., object]) -> None:
    """Tell `CallLog` which handler answers a call that no route was looked up for."""
    if _SEEN in scope:
        scope[_SEEN].call = getattr(handler, "__name__", _OTHER)


class _Seen:
    """Shared by the copies that middlewares make of a scope."""

    call = _OTHER


class _Answer:
    """499 is what a client that went away would have been told."""

    status = 499
    headers: Sequence[tuple[bytes, bytes]] = ()

    @property
    def request_id(self) -> str:
        return Headers(raw=list(self.headers)).get(REQUEST_ID_HEADER, "-")
