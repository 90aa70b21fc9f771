"""HEAD and OPTIONS for every route, as ASGI middleware. Knows methods; knows no route's work.

HEAD is GET that ends with its head: the body is left out, and a stream learns that nobody waits for it. OPTIONS that is
no preflight names what a path takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ASKED = "kontextd.asked_head"


def is_head(scope: Scope) -> bool:
    """Whether the body of the answer will be left out: it need not be read from the disk."""
    return bool(scope.get(_ASKED, False))


class WholeMethods:
    """Stands right before the application whose routes it is given."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET", _ASKED: True}, receive, _without_body(send))
        elif taken := self._taken(scope):
            await Response(status_code=204, headers={"Allow": ", ".join(taken)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _taken(self, scope: Scope) -> list[str]:
        methods = [
            method
            for method in ("GET", "POST", "PUT")
            if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in self._routes)
        ]
        if not methods:
            return []
        return [*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]


def _without_body(send: Send) -> Send:
    """Ends the answer at its head, which ASGI servers tell whoever waits for `http.disconnect`."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_head
