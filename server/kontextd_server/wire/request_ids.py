"""`x-fal-request-id` on every answer, as ASGI middleware. Knows no requests in the queue: a route may set its own."""

from __future__ import annotations

import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-fal-request-id"
_KEY = "kontextd.request_id"


def request_id_of(connection: HTTPConnection) -> str:
    """The id that this answer carries, and that its log lines should; "-" where the middleware is not in place."""
    request_id: str = connection.scope.get(_KEY, "-")
    return request_id


def new_request_id() -> str:
    return str(uuid.uuid4())


class RequestIds:
    """Without it Python's client takes a 503 that mentions nginx for one of an ingress, and sends again."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_request_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REQUEST_ID_HEADER, request_id)
            await send(message)

        await self.app({**scope, _KEY: request_id}, receive, send_with_id)
