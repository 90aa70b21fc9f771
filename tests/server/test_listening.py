"""The API process as its supervisor sees it; whole servers are in `live` and `drills`."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
from kontextd_server.api import Drain, Listening
from kontextd_server.listening import _Server, listening_socket, serve_api
from kontextd_server.settings import SettingError, Settings
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a connection does not inherit it")
def test_what_is_accepted_notices_that_its_client_is_lost() -> None:
    with (
        closing(listening_socket("127.0.0.1", 0)) as listener,
        closing(socket.create_connection(listener.getsockname())),
        closing(listener.accept()[0]) as accepted,
    ):
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        times = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [accepted.getsockopt(socket.IPPROTO_TCP, name) for name in times] == [60, 15, 4]


def test_the_api_may_open_as_many_files_as_its_process_may_allow_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = []
    monkeypatch.setattr("kontextd_server.listening.raise_limit", lambda: raised.append(True))
    with closing(socket.socket()) as listener, pytest.raises(SettingError):  # it has no database
        serve_api(Settings(data=tmp_path), listener)
    assert raised == [True]
