"""The API process as its supervisor sees it; whole servers are in `live` and `drills`."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from kontextd_server.api import Drain, Listening
from kontextd_server.listening import _Server
from kontextd_server.worker.notify import ALIVE, Notifier, NotifySocket
from starlette.types import Receive, Scope, Send


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that is never called here."""


def test_the_loop_that_answers_beats_once_a_second(tmp_path: Path) -> None:
    with NotifySocket(tmp_path / "notify.sock") as ear:
        server = _Server(nothing, Listening(), Drain(1.0))
        server.config.load()
        server.notifier = Notifier(ear.address)
        ended = [asyncio.run(server.on_tick(tick)) for tick in range(20)]  # uvicorn calls it ten times a second
        server.notifier.close()
        assert ear.heard() == [ALIVE, ALIVE]
    assert not any(ended)


def test_a_signal_ends_the_server_and_not_what_stands_after_it() -> None:
    server = _Server(nothing, Listening(), Drain(1.0))
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, server.force_exit) == (True, False)
    server.handle_exit(signal.SIGINT, None)  # impatience
    assert server.force_exit
