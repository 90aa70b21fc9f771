"""A receiver of webhooks that can be away, and remembers what it was told. Knows HTTP; knows no jobs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .processes import free_port


@dataclass(frozen=True)
class Heard:
    """One delivery, and the status that it was answered."""

    request_id: str
    status: int
    body: dict[str, Any]  # Any: decoded JSON


@dataclass
class Receiver:
    """`answer` gives the status of each answer. Once closed it refuses connections, until it is opened again."""

    answer: Callable[[], int] = lambda: 200
    heard: list[Heard] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/webhook"

    def open(self) -> None:
        """At the port that it had before."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._take(self)

            def log_message(self, *_: object) -> None:
                """Not into the output of the tests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def successes(self, request_id: str) -> int:
        return sum(one.request_id == request_id and one.status == 200 for one in list(self.heard))

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        status = self.answer()
        self.heard.append(Heard(body["request_id"], status, body))
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
