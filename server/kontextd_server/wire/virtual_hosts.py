"""Routing by host, as ASGI middleware: every way to write a call becomes one path. Knows ASGI; answers no call itself.

Behind it the routes are those of a plain address, each call written one way: `/{id}`, `/{id}/stream`, `/queue/{id}`,
`/queue/{app}/requests/{request_id}` and what follows it, `/rest/…`, `/files/…`, and our own pages. `context_of` gives
them what was found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from kontextd_server.wire.addresses import AddressSettings, Bases, Origin, Said, bases_for, said_of, said_origin
from kontextd_server.wire.endpoints import ENDPOINTS, Call, Endpoint, queue_call, run_call
from kontextd_server.wire.error_answers import error_response
from kontextd_server.wire.errors import WireError
from kontextd_server.wire.hosts import Host, Place, Role, place

_CONTEXT = "kontextd.context"
_PROXY_ORIGIN = "kontextd.proxy_origin"
_MAX_REMEMBERED = 1000  # callers choose what they write into these headers


@dataclass(frozen=True)
class Context:
    """What the address of a request says. `call` is None but for the run and queue roles; `origin` is where the
    caller reached us, which a webhook's URLs are rendered from later."""

    role: Role
    call: Call | None
    origin: Origin
    bases: Bases
    proxied: bool = False


def context_of(connection: HTTPConnection) -> Context:
    context: Context = connection.scope[_CONTEXT]
    return context


def proxied_scope(scope: Scope, origin: Origin) -> Scope:
    """The scope marked as one of a proxied call: its URLs are rendered for where the proxy was reached."""
    return {**scope, _PROXY_ORIGIN: origin}


@dataclass(frozen=True)
class _Reached:
    """The host that a call names, and where its URLs lead to."""

    host: Host
    origin: Origin
    bases: Bases


class VirtualHosts:
    """Writes each path as the routes expect it, and answers what no route could: an unknown endpoint, a bad Host."""

    def __init__(self, app: ASGIApp, settings: AddressSettings, table: Sequence[Endpoint] = ENDPOINTS) -> None:
        self.app, self.settings, self.table = app, settings, table
        self._reached: dict[tuple[Said, Origin | None], _Reached] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            inner = self._located(scope)
        except WireError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(inner, receive, send)

    def _located(self, scope: Scope) -> Scope:
        proxy_origin: Origin | None = scope.get(_PROXY_ORIGIN)
        reached = self._reached_at(scope, proxy_origin)
        found = place(reached.host, scope["path"], self.settings.names)
        call = self._call(found)
        path = Place(found.role, call.path).plain_path if call else found.plain_path
        context = Context(found.role, call, reached.origin, reached.bases, proxy_origin is not None)
        return {**scope, "path": path, "raw_path": quote(path).encode(), _CONTEXT: context}

    def _reached_at(self, scope: Scope, proxy_origin: Origin | None) -> _Reached:
        """Remembered by all that it depends on: to find it out again takes longer than the rest of `_located`."""
        said = said_of(scope, self.settings)
        asked_by = said, proxy_origin
        reached = self._reached.get(asked_by)
        if reached is None:
            asked = said_origin(said)
            origin = proxy_origin or asked
            if len(self._reached) >= _MAX_REMEMBERED:
                self._reached.clear()
            reached = self._reached[asked_by] = _Reached(asked.host, origin, bases_for(origin, self.settings))
        return reached

    def _call(self, found: Place) -> Call | None:
        if found.role is Role.RUN:
            return run_call(found.path, self.table)
        if found.role is Role.QUEUE:
            return queue_call(found.path, self.table)
        return None
