"""The exception tree of the wire. Knows what went wrong and where; `error_table` knows what a client is told of it.

    WireError
    ├── BadRequest                  a header, a query, a target that cannot be right
    │   └── StillInProgress         a result asked for before the request is done
    ├── AuthError                   no key, or a wrong, revoked or expired one
    │   └── NotPermitted            a good key without the scope that this call needs
    ├── NotFound
    │   ├── UnknownEndpoint         the message names the endpoints that exist
    │   ├── UnknownRequest          also what another owner's request looks like
    │   └── ResultGone              a result that was removed, with the reason
    ├── MethodNotAllowed
    ├── BodyTooLarge
    ├── Invalid                     the body, by field: one `FieldError` each
    │   └── IdempotencyMismatch     an Idempotency-Key used again with another body
    ├── TooManyRequests             try again later: nothing was accepted
    │   ├── QueueFull
    │   └── RateLimited
    ├── NotAccepted                 the server cannot take requests now: nothing was accepted
    ├── Cancelled                   by the caller
    ├── StartTimeout                not started within the caller's X-Fal-Request-Timeout
    ├── GenerationTimeout           started, and stopped at its deadline
    ├── RunnerDisconnected          the workers died on it, and its attempts are used up
    └── InternalError               whatever else

Every message names the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class FieldError:
    """What is wrong with one value. `loc` begins with "body", "query" or "header"; `url` documents the type.

    `input` is the value as it was sent, where that is short enough to send back; `has_input` tells an absent one from
    null.
    """

    loc: Loc
    msg: str
    type: str
    ctx: Mapping[str, object] | None = None
    input: object = None
    has_input: bool = False
    url: str | None = None  # None: fal's page on the type


class WireError(Exception):
    """Base of all that a client is told by a status code. `headers` go into the answer."""

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})


class BadRequest(WireError):
    """A header, a query parameter or a target that cannot be right."""


class StillInProgress(BadRequest):
    """The result of a request that is not done yet."""

    def __init__(self) -> None:
        super().__init__("Request is still in progress")


class AuthError(WireError):
    """No credential, or one that is not valid."""


class NotPermitted(AuthError):
    """The credential is valid but lacks what this call needs."""


class NotFound(WireError):
    """Nothing is here."""


class UnknownEndpoint(NotFound):
    """No endpoint has this id."""

    def __init__(self, asked: str, exist: Sequence[str]) -> None:
        super().__init__(f"there is no endpoint {asked[:200]!r}; this server has: {', '.join(exist)}.")


class UnknownRequest(NotFound):
    """No request of this caller has this id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"there is no request {request_id[:100]!r}.")


class ResultGone(NotFound):
    """The request is done, but its result was removed."""


class MethodNotAllowed(WireError):
    """The path exists with another method."""

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        names = ", ".join(allowed)
        super().__init__(f"{method} is not allowed here; use {names}.", headers={"Allow": names})


class BodyTooLarge(WireError):
    """The body is over the limit."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"the body is larger than the {max_bytes} bytes allowed. Upload the files and send their URLs."
        )


class Invalid(WireError):
    """The body is not what the endpoint takes."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, error.loc))}: {error.msg}" for error in errors))
        self.errors = tuple(errors)


class IdempotencyMismatch(Invalid):
    """Never 409: Python's client posts again on a 409."""

    def __init__(self, key: str) -> None:
        told = f"the Idempotency-Key {key[:100]!r} was used with another body. Use a new key for a new request."
        super().__init__([FieldError(("header", "idempotency-key"), told, "idempotency_key_reused")])


class TooManyRequests(WireError):
    """Not accepted; the same request may be accepted later."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class QueueFull(TooManyRequests):
    """More requests are waiting than the caller, or the operator, allows."""


class RateLimited(TooManyRequests):
    """The key has sent more requests in a short time than it may."""


class NotAccepted(WireError):
    """The server is going down, or its database is away: nothing was accepted, so sending again is right."""


class Cancelled(WireError):
    """The caller cancelled the request, or went away."""


class StartTimeout(WireError):
    """The request did not start within the time its caller gave it."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request did not start within {timeout_s:g} s (X-Fal-Request-Timeout).")


class GenerationTimeout(WireError):
    """The request started and was stopped at its deadline."""


class RunnerDisconnected(WireError):
    """The worker died, as often as a request is tried."""


class InternalError(WireError):
    """The fault is here. The message is for the caller: no paths, no values of others."""
