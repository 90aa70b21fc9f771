"""fal's proxy protocol, answered inside the process. Knows ASGI and URLs; opens no connection, ever.

A client with `proxyUrl` sends every call to one address of ours, the real target in `x-fal-target-url`. The target is
parsed and its host mapped to a virtual host; the call is then dispatched like any other. A host that is none of ours
is a 400.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kontextd_server.wire.addresses import AddressSettings, origin_of
from kontextd_server.wire.error_answers import error_response
from kontextd_server.wire.errors import BadRequest, WireError
from kontextd_server.wire.hosts import HostNames, parse_host
from kontextd_server.wire.virtual_hosts import proxied_scope

TARGET_HEADER = "x-fal-target-url"
PROXY_PATH = "/api/fal/proxy"
_MAX_TARGET = 8192
# RFC 3986: what a URL is written in. No space, no control character, no backslash, nothing beyond ASCII.
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Said of the request to the proxy: of the inner one they are not true.
_NOT_PASSED_ON = {
    b"host",
    b"x-fal-target-url",
    b"x-forwarded-host",
    b"x-forwarded-port",
    b"x-forwarded-prefix",
    b"x-forwarded-proto",
}


@dataclass(frozen=True)
class Lending:
    """A key of the operator's, used for pages of the listed origins that send none of their own.

    An Origin protects nothing outside browsers: whoever can reach the server can name one. So the key should be able to
    do no more than infer, and have a rate limit.
    """

    key: str
    origins: frozenset[str]


@dataclass(frozen=True)
class Target:
    """Where a proxied call wants to go: a host of fal's, a path, a query."""

    host: str
    path: str
    query: str


def parse_target(text: str, names: HostNames) -> Target:
    """The target of a proxied call. Raises `BadRequest` for anything but an https URL at a host of fal's."""
    if len(text) > _MAX_TARGET or not _URL_CHARACTERS.fullmatch(text) or _PERCENT.search(text):
        raise BadRequest(f"{TARGET_HEADER} is {text[:200]!r}, which is no URL.")
    try:
        parts = urlsplit(text)
        host = parse_host(parts.netloc)
    except (ValueError, BadRequest) as error:
        raise BadRequest(f"{TARGET_HEADER} is {text[:200]!r}, which is no URL with a host.") from error
    if parts.scheme != "https" or parts.fragment or host.port not in (None, 443):
        raise BadRequest(f"{TARGET_HEADER} is {text[:200]!r}; it must be https, without a port and a fragment.")
    if host.name not in names.all:
        raise BadRequest(
            f"{TARGET_HEADER} names the host {host.name!r}; this server answers for {', '.join(names.all)}."
        )
    return Target(host.name, unquote(parts.path) or "/", parts.query)


class FalProxy:
    """Answers the proxy path, and hands everything else on untouched."""

    def __init__(
        self, app: ASGIApp, settings: AddressSettings, path: str = PROXY_PATH, lending: Lending | None = None
    ) -> None:
        self.app, self.settings, self.path, self.lending = app, settings, path, lending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != self.path:
            await self.app(scope, receive, send)
            return
        try:
            inner = self._dispatched(scope)
        except WireError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(inner, receive, send)

    def _dispatched(self, scope: Scope) -> Scope:
        headers = Headers(scope=scope)
        targets = headers.getlist(TARGET_HEADER)
        if len(targets) != 1:
            raise BadRequest(f"the proxy needs the header {TARGET_HEADER} once; it is there {len(targets)} times.")
        target = parse_target(targets[0], self.settings.names)
        kept = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED_ON]
        inner = {
            **scope,
            "scheme": "https",
            "path": target.path,
            "raw_path": target.path.encode(),
            "query_string": target.query.encode(),
            "headers": [(b"host", target.host.encode()), *kept, *self._lent(headers)],
        }
        return proxied_scope(inner, origin_of(scope, self.settings))

    def _lent(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        if self.lending is None or "authorization" in headers or headers.get("origin") not in self.lending.origins:
            return []
        return [(b"authorization", f"Key {self.lending.key}".encode())]
