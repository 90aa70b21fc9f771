"""The API process under uvicorn: where it listens and how it ends. Knows sockets and signals; knows no routes."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from kontextd_server.api.drain import Drain

_CANCELLED_AFTER_S = 5.0  # beyond the drain: what still runs then is cut off


@dataclass(frozen=True)
class Listening:
    """Seconds where a name ends in `_s`. `backlog`: connections that wait to be accepted."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None
    keep_alive_s: int = 65  # longer than the 60 s after which nginx and most clients let a connection go
    backlog: int = 2048


class ApiServer(uvicorn.Server):
    """`run()` serves until SIGTERM or SIGINT, or until `should_exit` is set; then it drains.

    Nothing is accepted while it drains: open calls may end within the drain's time, after which sync runs and streams
    are cancelled.
    """

    def __init__(self, app: ASGIApp, listening: Listening, drain: Drain) -> None:
        super().__init__(_config(app, listening, drain))
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begin()
        await super().shutdown(sockets)


def _config(app: ASGIApp, listening: Listening, drain: Drain) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=listening.host,
        port=listening.port,
        ssl_certfile=listening.tls_cert,
        ssl_keyfile=listening.tls_key,
        backlog=listening.backlog,
        timeout_keep_alive=listening.keep_alive_s,
        timeout_graceful_shutdown=round(drain.grace_s + _CANCELLED_AFTER_S),
        lifespan="off",
        ws="none",  # /realtime is then an ordinary call, with an ordinary 404
        proxy_headers=False,  # the front door believes only the proxies that it is told to
        server_header=False,
        access_log=False,  # it would hold tokens and grants; ours does not
        log_config=None,
    )
