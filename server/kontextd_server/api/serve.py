"""The API process under uvicorn: where it listens and how it ends. Knows sockets and signals; knows no routes."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from kontextd_server.api.descriptors import Shortage
from kontextd_server.api.drain import Drain

log = logging.getLogger(__name__)

# Between two garbage collections. A call has some seventy objects while it is under way and leaves no cycles behind, so
# with Python's 700 ten calls at once were collection after collection that found nothing.
_YOUNG_OBJECTS = 10_000
_CANCELLED_AFTER_S = 5.0  # beyond the drain: what still runs then is cut off
_TICKS_A_LOOK = 10  # at the connections; uvicorn ticks ten times a second


@dataclass(frozen=True)
class Listening:
    """Seconds where a name ends in `_s`. `backlog`: connections that wait to be accepted.

    A client may take `head_s` for a request line with its headers, and stand still for `stall_s` amid a body that it
    sends or an answer that it reads.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None
    keep_alive_s: int = 65  # longer than the 60 s after which nginx and most clients let a connection go
    backlog: int = 2048
    head_s: float = 30.0
    stall_s: float = 120.0


class ApiServer(uvicorn.Server):
    """`run()` serves until SIGTERM or SIGINT, or until `should_exit` is set; then it drains.

    Nothing is accepted while it drains: open calls may end within the drain's time, after which sync runs and streams
    are cancelled.
    """

    def __init__(self, app: ASGIApp, listening: Listening, drain: Drain) -> None:
        super().__init__(_config(app, listening, drain))
        self._drain = drain
        self._listening = listening
        self._shortage = Shortage()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            # What was made until now stays to the end of the process. The garbage collection would go through all of it
            # again and again, and stop every call for some 80 ms each time.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_YOUNG_OBJECTS)
        super().run(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_A_LOOK == 0:
            self._look(time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begin()
        await super().shutdown(sockets)

    def _look(self, now: float) -> None:
        connections = list(self.server_state.connections)
        self._shortage.look(now, len(connections))
        for connection in connections:
            if hasattr(connection, "give_up_if_stalled"):  # BoundedHttp; not h11's
                connection.give_up_if_stalled(now, self._listening.head_s, self._listening.stall_s)


def _config(app: ASGIApp, listening: Listening, drain: Drain) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_http(),
        loop=_loop(),
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


def _http() -> type[asyncio.Protocol] | Literal["h11"]:
    if find_spec("httptools") is None:
        log.warning("httptools is not installed: calls are read by h11, which takes longer.")
        return "h11"
    from kontextd_server.api.bounded_http import BoundedHttp

    return BoundedHttp


def _loop() -> Literal["uvloop", "asyncio"]:
    if find_spec("uvloop") is None:
        log.warning("uvloop is not installed: calls are served by asyncio's own event loop, which takes longer.")
        return "asyncio"
    return "uvloop"
