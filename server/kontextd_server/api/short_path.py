"""The calls that clients repeat, around FastAPI: the same handlers, found by what the front door has read already.

FastAPI's routes for them stay, and document them: its routing, dependencies and middlewares take longer than the
handler of a status poll, and a fifth of a submit's time. Knows actions and exceptions; answers nothing itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kontextd_server.api.logs import name_call
from kontextd_server.wire.endpoints import Action
from kontextd_server.wire.virtual_hosts import context_of

# With the id of the request behind it, where the action is one on a request.
Handler = Callable[..., Awaitable[Response]]

_METHODS = {Action.STATUS: "GET", Action.RESULT: "GET", Action.SUBMIT: "POST", Action.RUN: "POST"}
_FAILURE = "kontextd.failure"


class ShortPath:
    """Stands right before the application whose routes it shortens, behind the front door.

    The handlers bear the names of their routes, and exceptions are answered as the application answers them.
    """

    def __init__(self, app: Starlette, handlers: Mapping[Action, Handler]) -> None:
        self._app, self._handlers = app, handlers
        self._failed = _answering_like(app, _raise_failure)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        call = context_of(request).call
        handler = self._handlers.get(call.action) if call is not None else None
        if call is None or handler is None or scope["method"] != _METHODS[call.action]:
            await self._app(scope, receive, send)
            return
        name_call(scope, handler)
        try:
            of = () if call.request_id is None else (call.request_id,)
            answer: ASGIApp = await handler(request, *of)
        except Exception as error:  # whatever it is: answered, or raised again, by the application's own table
            scope[_FAILURE] = error
            answer = self._failed
        await answer(scope, receive, send)


def _answering_like(app: Starlette, inner: ASGIApp) -> ASGIApp:
    """`inner` with the exception handlers of `app` around it, put together as Starlette does it."""
    expected = {kind: handle for kind, handle in app.exception_handlers.items() if kind is not Exception}
    return ServerErrorMiddleware(ExceptionMiddleware(inner, expected), app.exception_handlers.get(Exception))


async def _raise_failure(scope: Scope, receive: Receive, send: Send) -> None:
    failure: Exception = scope[_FAILURE]
    raise failure
