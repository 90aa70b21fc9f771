"""What no client may do to a connection: switch its protocol, put a request into a body, send or wait without end."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from http.client import parse_headers
from typing import BinaryIO

import pytest
from kontextd_server.api import ApiServer, Listening
from kontextd_server.api.bounded_http import MAX_HEADER_BYTES, BoundedHttp
from kontextd_server.store import JobFilter, JobState

from .conftest import ENDPOINT, INPUT, Box, eventually, running

HELLO = b"GET /health HTTP/1.1\r\nHost: box\r\n\r\n"
LAST = HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",  # the JDK's, at each call
    b"Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
)
MAX_READ = 2**18  # bytes that one read of a socket brings at most
FILE_BYTES = 16_000_000
TIMES_S = 0.2  # instead of half a minute and two


class Clock:
    """Stands still until it is told to go on. `asked`: how often somebody wanted to know."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def monotonic(self) -> float:
        self.asked += 1
        return self.now

    def go_on(self, seconds: float) -> None:
        """And wait until the server has looked at its connections by it, from the first to the last."""
        self.now += seconds
        seen = self.asked
        eventually(lambda: self.asked >= seen + 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("kontextd_server.api.serve.time", clock)
    monkeypatch.setattr("kontextd_server.api.serve._TICKS_A_LOOK", 1)
    return clock


def serve(box: Box, **times: float) -> ApiServer:
    server = ApiServer(box.app(), Listening(port=0, **times), box.drain)  # type: ignore[arg-type]  # floats they are
    box.port = box.stack.enter_context(running(server))
    return server


def connect(box: Box, receive_buffer: int | None = None) -> socket.socket:
    connection = box.stack.enter_context(socket.socket())
    connection.settimeout(120)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", box.port))
    return connection


def head(box: Box, line: str, more: bytes = b"") -> bytes:
    return (
        f"{line} HTTP/1.1\r\nHost: 127.0.0.1:{box.port}\r\nAuthorization: Key {box.key}\r\n".encode() + more + b"\r\n"
    )


def upload(box: Box, body: bytes, more: bytes = b"") -> bytes:
    return head(box, "POST /files/upload", b"Content-Length: %d\r\n" % len(body) + more) + body


def chunked(box: Box, more: bytes = b"") -> bytes:
    return head(box, "POST /files/upload", b"Transfer-Encoding: chunked\r\n" + more)


def answer(answers: BinaryIO) -> tuple[int, bytes]:
    status = int(answers.readline().split()[1])
    return status, answers.read(int(parse_headers(answers)["content-length"]))


def until_closed(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return bytes(received)


def stored(box: Box, answered: tuple[int, bytes]) -> bytes:
    status, told = answered
    assert status == 200, told
    return box.client().get(json.loads(told)["access_url"]).content


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("is_apart", [False, True])
def test_the_body_of_a_request_that_asks_for_an_upgrade_is_its_body(
    idle_box: Box, upgrade: bytes, is_apart: bool
) -> None:
    box, server = idle_box, serve(idle_box)
    connection = connect(box)
    answers = connection.makefile("rb")
    for body in (HELLO, b"\0" * 300_000):
        request = upload(box, body, upgrade)
        if is_apart:
            connection.sendall(request[: -len(body)])
            eventually(lambda: server.server_state.tasks)  # it has read the head
            connection.sendall(body)
        else:
            connection.sendall(request)
        assert stored(box, answer(answers)) == body
    connection.sendall(LAST)
    assert answers.read().count(b"HTTP/1.1 ") == 1  # and nothing was answered twice


def test_chunks_pieces_and_pipelines_pass_with_it_too(box: Box) -> None:
    connection = connect(box)
    answers = connection.makefile("rb")
    requests = [
        upload(box, b"one", UPGRADES[0]),
        chunked(box, UPGRADES[0]) + b"3\r\ntwo\r\n0\r\n\r\n",
        upload(box, b"three"),
        upload(box, b"four", UPGRADES[1]),
        upload(box, b"five", b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"),
    ]
    sent = b"".join(requests)
    for start in range(0, len(sent), 100):
        connection.sendall(sent[start : start + 100])
    assert [stored(box, answer(answers)) for _ in requests] == [b"one", b"two", b"three", b"four", b"five"]
    assert answers.read() == b""


def test_very_many_upgrades_in_one_read_are_answered_one_by_one(box: Box) -> None:
    request = HELLO[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    connection = connect(box)
    connection.sendall(request * 1100 + LAST)
    assert until_closed(connection).count(b"HTTP/1.1 200 ") == 1101


@pytest.mark.parametrize("line", ["CONNECT box:443", "CONNECT /health"])
def test_it_is_no_proxy(box: Box, line: str) -> None:
    connection = connect(box)
    connection.sendall(head(box, line, UPGRADES[0]) + HELLO)
    answered = until_closed(connection)
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert answered.count(b"HTTP/1.1 ") == 1


def test_a_trailer_is_no_header(box: Box) -> None:
    """Nobody gets in by a key after the body, and what comes next on the connection is not touched."""
    connection = connect(box)
    answers = connection.makefile("rb")
    key = b"Authorization: Key %s\r\n" % box.key.encode()
    bare = chunked(box).replace(key, b"")
    connection.sendall(bare + b"3\r\nabc\r\n0\r\n" + key + b"Expect: 100-continue\r\n\r\n")
    assert answer(answers)[0] == 401
    connection.sendall(chunked(box) + b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
    assert stored(box, answer(answers)) == b"abc"


ENDLESS = {
    "trailers": (b"3\r\nabc\r\n0\r\n", b"X-More: " + b"y" * 1000 + b"\r\n"),
    "a trailer": (b"3\r\nabc\r\n0\r\nX-Long: ", b"z" * 1000),
    "the extension of a chunk": (b"3;name=", b"z" * 1000),
    "the size of a chunk": (b"", b"0" * 1000),
}


@pytest.mark.parametrize("begin", ["GET /nothing-here", "POST /files/upload"])
@pytest.mark.parametrize("what", ENDLESS)
def test_what_does_not_end_amid_a_body_is_broken_off(box: Box, begin: str, what: str) -> None:
    """Answered by then, or not."""
    start, piece = ENDLESS[what]
    connection = connect(box)
    connection.sendall(head(box, begin, b"Transfer-Encoding: chunked\r\n") + start)

    def send_without_end() -> None:
        for _ in range((MAX_HEADER_BYTES + 64 * MAX_READ) // len(piece)):
            connection.sendall(piece)

    with pytest.raises(ConnectionError):
        send_without_end()


def test_long_bodies_of_small_chunks_and_short_trailers_pass(box: Box) -> None:
    connection = connect(box)
    connection.sendall(chunked(box) + b"1;x=y\r\na\r\n" * 50_000 + b"0\r\nX-Sum: " + b"1" * 30_000 + b"\r\n\r\n")
    assert stored(box, answer(connection.makefile("rb"))) == b"a" * 50_000


HALF_SENT = ("nothing", "half a head", "half a body", "half a chunk")
HALF_SENT_AFTER_AN_ANSWER = ("half a body that is refused", "an empty line", "half a next head")


def send_half(box: Box, what: str) -> socket.socket:
    """What comes after an answer is sent after it, because uvicorn's time for idle connections is over then."""
    first, then = {
        "nothing": (b"", b""),
        "half a head": (HELLO[:20], b""),
        "half a body": (upload(box, b"abc")[:-1], b""),
        "half a chunk": (chunked(box) + b"3\r\nab", b""),
        "half a body that is refused": (upload(box, b"abc").replace(b"Key ", b"Kex ")[:-3], b"ab"),
        "an empty line": (HELLO, b"\r\n"),
        "half a next head": (HELLO, HELLO[:20]),
    }[what]
    connection = connect(box)
    connection.sendall(first)
    if then:
        answer(connection.makefile("rb"))
        connection.sendall(then)
    return connection


@pytest.mark.parametrize("what", HALF_SENT + HALF_SENT_AFTER_AN_ANSWER)
def test_a_request_that_does_not_end_is_broken_off(idle_box: Box, what: str) -> None:
    server = serve(idle_box, head_s=TIMES_S, stall_s=TIMES_S)
    until_closed(send_half(idle_box, what))
    eventually(lambda: not server.server_state.connections)


def test_it_has_its_time(idle_box: Box, clock: Clock) -> None:
    connections = serve(idle_box).server_state.connections
    for what in HALF_SENT + HALF_SENT_AFTER_AN_ANSWER:
        send_half(idle_box, what)
    eventually(lambda: len(connections) == 7)
    clock.go_on(0.0)
    clock.go_on(29.0)
    assert len(connections) == 7
    clock.go_on(2.0)
    eventually(lambda: len(connections) == 3)  # those amid a body have two minutes
    clock.go_on(88.0)
    assert len(connections) == 3
    clock.go_on(2.0)
    eventually(lambda: not connections)


def test_a_slow_upload_that_goes_on_is_not_broken_off(idle_box: Box, clock: Clock) -> None:
    serve(idle_box)
    connection, body = connect(idle_box), b"slowly"
    sent = upload(idle_box, body)
    connection.sendall(sent[: -len(body)])
    for byte in body:
        clock.go_on(100.0)
        connection.sendall(bytes([byte]))
        clock.go_on(0.0)
    assert stored(idle_box, answer(connection.makefile("rb"))) == body


def test_a_long_run_whose_client_is_silent_is_not_broken_off(idle_box: Box, clock: Clock) -> None:
    box = idle_box
    serve(box)
    box.worker.start()
    box.worker.held.clear()
    body = json.dumps(INPUT).encode()
    connections = [connect(box) for _ in range(2)]
    for connection, path in zip(connections, ("", "/stream"), strict=True):
        length = b"Content-Length: %d\r\n" % len(body)
        connection.sendall(head(box, f"POST /{ENDPOINT}{path}", length + b"Connection: close\r\n") + body)
    eventually(lambda: box.store.views.jobs(JobFilter(state=JobState.IN_PROGRESS)))
    for _ in range(3):
        clock.go_on(1000.0)
    box.worker.held.set()
    for connection in connections:
        answered = until_closed(connection)
        assert answered.startswith(b"HTTP/1.1 200 ")
        assert b"red.png" in answered or b"images" in answered


def begin_to_read(box: Box) -> tuple[socket.socket, Callable[[], bool]]:
    """A client that has read nothing of a file larger than all buffers between, and whether it is waited for."""
    connections = serve(box).server_state.connections
    url = json.loads(box.client().post("/files/upload", content=b"x" * FILE_BYTES).content)["access_url"]
    connection = connect(box, receive_buffer=65_536)
    connection.sendall(head(box, f"GET {url.removeprefix(box.url)}", b"Connection: close\r\n"))

    def is_waited_for() -> bool:
        return any(isinstance(each, BoundedHttp) and each.flow.write_paused for each in list(connections))

    eventually(is_waited_for)
    return connection, is_waited_for


def test_a_file_whose_reader_stands_still_is_broken_off(idle_box: Box, clock: Clock) -> None:
    connection, is_waited_for = begin_to_read(idle_box)
    for _ in range(100):  # more than once as long as something goes into the buffers between
        clock.go_on(121.0)
        if not is_waited_for():
            break
    assert len(until_closed(connection)) < FILE_BYTES


def test_a_file_whose_reader_is_slow_is_not(idle_box: Box, clock: Clock) -> None:
    connection, _ = begin_to_read(idle_box)
    clock.go_on(0.0)
    received = 0
    for _ in range(4):
        clock.go_on(100.0)
        received += len(connection.recv(1_000_000, socket.MSG_WAITALL))
        clock.go_on(0.0)
    assert received + len(until_closed(connection)) > FILE_BYTES
