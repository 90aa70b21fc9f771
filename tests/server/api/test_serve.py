"""The server under the application: what it reads, how much of it, and what it is made of."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import socket
from unittest.mock import Mock

import pytest
import uvicorn
from kontextd_server.api import ApiServer, Drain, Listening
from kontextd_server.api.bounded_http import MAX_HEADER_BYTES, BoundedHttp
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from .conftest import ENDPOINT, INPUT, Box, in_thread

MAX_READ = 2**18  # bytes that one read of a socket brings at most
HEAD = b"GET /health HTTP/1.1\r\nHost: box\r\n"


def connect(box: Box) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", box.port), timeout=30)
    box.stack.enter_context(connection)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def server() -> ApiServer:
    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    return ApiServer(nothing, Listening(port=0), Drain(0.1))


@pytest.mark.parametrize("piece", [b"X-More: " + b"y" * 1000 + b"\r\n", b"z" * 1000])
def test_headers_that_do_not_end_are_broken_off(box: Box, piece: bytes) -> None:
    """Many of them, or one; whoever sends them needs no key."""
    connection = connect(box)
    connection.sendall(HEAD + b"X-Long: ")

    def send_without_end() -> None:
        for _ in range((MAX_HEADER_BYTES + 64 * MAX_READ) // len(piece)):
            connection.sendall(piece)

    with pytest.raises(ConnectionError):
        send_without_end()
    assert box.client("").get("/health").status_code == 200


def test_whoever_sends_them_is_told_the_limit() -> None:
    async def told() -> bytes:
        transport = Mock(asyncio.Transport)
        transport.is_closing.side_effect = lambda: transport.close.called
        protocol = BoundedHttp(config=server().config, server_state=ServerState(), app_state={})
        protocol.connection_made(transport)
        protocol.data_received(HEAD)
        for _ in range(MAX_HEADER_BYTES // 1000 + 1):
            assert not transport.close.called
            protocol.data_received(b"X-More: " + b"y" * 990 + b"\r\n")
        (written,) = transport.write.call_args_list
        assert transport.close.called
        return written.args[0]

    answer = asyncio.run(told())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert str(MAX_HEADER_BYTES).encode() in answer


def test_long_headers_that_end_pass_one_call_after_the_other(box: Box) -> None:
    client = box.client()
    for _ in range(4):
        answer = client.get("/health", headers={"X-Long": "y" * (MAX_HEADER_BYTES // 2)})
        assert answer.status_code == 200
        assert client.post(f"/queue/{ENDPOINT}", json={**INPUT, "prompt": "x" * 2 * MAX_HEADER_BYTES}).is_success


def test_calls_that_come_in_pieces_and_two_at_a_time_are_answered(box: Box) -> None:
    connection, call = connect(box), HEAD + b"\r\n"
    connection.sendall(call + call[:20])
    connection.sendall(call[20:] + HEAD + b"Connection: close\r\n\r\n")
    assert until_closed(connection).count(b"HTTP/1.1 200 ") == 3


def test_it_reads_by_httptools_and_runs_on_uvloop() -> None:
    config = server().config
    assert (config.http, config.loop) == (BoundedHttp, "uvloop")


@pytest.mark.parametrize(("missing", "field", "instead"), [("httptools", "http", "h11"), ("uvloop", "loop", "asyncio")])
def test_without_them_it_says_so_and_is_slower(
    idle_box: Box,
    missing: str,
    field: str,
    instead: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("kontextd_server.api.serve.find_spec", lambda name: None if name == missing else real(name))
    assert getattr(server().config, field) == instead
    assert f"{missing} is not installed" in caplog.text
    assert idle_box.serve()
    assert idle_box.client().get("/health").status_code == 200


def test_the_main_thread_of_a_process_leaves_out_of_collections_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: frozen.append(gc.get_freeze_count()))
    assert gc.get_freeze_count() == 0
    with in_thread(server().run):  # a server among others: the heap is not its own
        pass
    try:
        server().run()
    finally:
        gc.unfreeze()
    assert frozen[0] == 0
    assert frozen[1] > 0
