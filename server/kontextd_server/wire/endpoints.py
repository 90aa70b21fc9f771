"""The endpoints as data, and what a path asks of them. Knows ids and paths; knows no hosts and no HTTP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kontextd_server.wire.errors import NotFound, UnknownEndpoint, UnknownRequest


@dataclass(frozen=True)
class Endpoint:
    """`fal-ai/flux-kontext/dev` has the owner fal-ai, the alias flux-kontext and the path dev."""

    owner: str
    alias: str
    path: str = ""

    @property
    def id(self) -> str:
        return f"{self.app}/{self.path}" if self.path else self.app

    @property
    def app(self) -> str:
        """What the URLs of a request begin with: clients drop the path."""
        return f"{self.owner}/{self.alias}"


KONTEXT_LORA = Endpoint("fal-ai", "flux-kontext-lora")
ENDPOINTS = (KONTEXT_LORA,)


class Action(StrEnum):
    """What can be asked of an endpoint, and of a request to it."""

    RUN = "run"
    STREAM = "stream"
    SUBMIT = "submit"
    RESULT = "result"
    STATUS = "status"
    STATUS_STREAM = "status_stream"
    CANCEL = "cancel"


# How the paths end; the first of two is how we write it.
_ENDS = {
    "": Action.RESULT,
    "/response": Action.RESULT,
    "/status": Action.STATUS,
    "/status/stream": Action.STATUS_STREAM,
    "/cancel": Action.CANCEL,
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Call:
    """An action, on an endpoint (RUN, STREAM, SUBMIT) or on the request `request_id` of an app."""

    action: Action
    app: str
    endpoint: Endpoint | None = None
    request_id: str | None = None

    @property
    def path(self) -> str:
        """The one path of this call, whichever way it was written."""
        if self.endpoint is not None:
            return f"/{self.endpoint.id}{'/stream' if self.action is Action.STREAM else ''}"
        end = next(end for end, action in _ENDS.items() if action is self.action)
        return f"/{self.app}/requests/{self.request_id}{end}"


def run_call(path: str, table: Sequence[Endpoint] = ENDPOINTS) -> Call:
    """The call of a path on the run host: an id, or an id and `/stream`. Raises `NotFound` and its kinds."""
    asked = path.strip("/")
    for endpoint in table:
        if asked == endpoint.id:
            return Call(Action.RUN, endpoint.app, endpoint)
        if asked == f"{endpoint.id}/stream":
            return Call(Action.STREAM, endpoint.app, endpoint)
        if asked == f"{endpoint.id}/realtime":
            raise NotFound(f"{endpoint.id} has no realtime endpoint; use run, stream or the queue.")
    raise UnknownEndpoint(asked, [endpoint.id for endpoint in table])


def queue_call(path: str, table: Sequence[Endpoint] = ENDPOINTS) -> Call:
    """The call of a path on the queue host. Raises `NotFound` and its kinds.

    A request is found under the owner and alias, as the clients write it, and under the full id.
    """
    asked, _, rest = path.strip("/").partition("/requests/")
    for endpoint in table:
        if rest and asked in (endpoint.id, endpoint.app):
            return _request_call(endpoint.app, rest)
        if not rest and asked == endpoint.id:
            return Call(Action.SUBMIT, endpoint.app, endpoint)
    raise UnknownEndpoint(asked, [endpoint.id for endpoint in table])


def _request_call(app: str, rest: str) -> Call:
    request_id, slash, end = rest.partition("/")
    if not _REQUEST_ID.fullmatch(request_id):
        raise UnknownRequest(request_id)
    if slash + end not in _ENDS:
        raise NotFound(f"a request has no {end[:100]!r}; it has status, status/stream, cancel and response.")
    return Call(_ENDS[slash + end], app, request_id=request_id)
