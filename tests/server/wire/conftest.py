"""A real server for tests of what only a real connection shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.types import ASGIApp


@contextmanager
def _serving(app: ASGIApp, certificate: Path | None, key: Path | None) -> Iterator[int]:
    config = uvicorn.Config(
        app,
        port=0,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Starts uvicorn with an application and returns its port; ends it with the test."""
    with ExitStack() as stack:
        yield lambda app, certificate=None, key=None: stack.enter_context(_serving(app, certificate, key))
