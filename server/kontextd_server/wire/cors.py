"""Which pages of other origins may call. Knows origins; Starlette's middleware does the work.

It has to be outermost: a preflight carries no key, so it is answered before anybody looks for one, and an error that a
page may not read is a riddle to its author.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

# What the clients and their authors read: the request id, the cause of an error, the ETag of an uploaded part.
EXPOSED_HEADERS = ("x-fal-request-id", "X-Fal-Error-Type", "X-Fal-Request-Timeout-Type", "X-Fal-Needs-Retry", "ETag")
METHODS = ("GET", "HEAD", "POST", "PUT")


@dataclass(frozen=True)
class CorsSettings:
    """`origins`: none by default; "*" is every page. Raises `ValueError` for what is no origin.

    `private_network` lets a page from the internet call a box on a private address (Chrome asks for it).
    """

    origins: tuple[str, ...] = ()
    private_network: bool = False

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin not in ("*", "null") and not _is_origin(origin):
                raise ValueError(f"{origin!r} is no origin; use one like https://app.studio.example:8080")


def with_cors(app: ASGIApp, settings: CorsSettings) -> ASGIApp:
    """The application, callable from pages of the listed origins. Any request header may be sent."""
    return CORSMiddleware(
        app,
        allow_origins=settings.origins,
        allow_methods=METHODS,
        allow_headers=("*",),
        allow_private_network=settings.private_network,
        expose_headers=EXPOSED_HEADERS,
    )


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        plain = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False
    # As browsers write it: in lower case and without a slash at the end.
    return plain and text == f"{parts.scheme}://{parts.netloc}".lower() and parts.scheme in ("http", "https")
