"""Event streams over a real connection: framing, keep-alives, how they end, how they fail, and what the clients see."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import fal_clients
import pytest
from kontextd_models.errors import ImageTooLarge
from kontextd_server.certs import write_certificates
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.errors import AuthError, RunnerDisconnected
from kontextd_server.wire.front_door import DoorSettings, front_door
from kontextd_server.wire.sse import EventStream, event
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

Serve = Callable[..., int]
Events = Callable[[], AsyncIterator[dict[str, object]]]

STREAM_PATH = "/fal-ai/flux-kontext-lora/stream"
PREVIEW = {"images": [{"url": "data:image/jpeg;base64,AA=="}], "prompt": "█"}
OUTPUT = {"images": [{"url": "http://box/files/a.png"}], "prompt": "█"}


async def succeeding() -> AsyncIterator[dict[str, object]]:
    yield PREVIEW
    yield OUTPUT


async def failing_in_the_middle() -> AsyncIterator[dict[str, object]]:
    yield PREVIEW
    raise RunnerDisconnected("the worker died three times on this request.")


async def failing_with_a_bug() -> AsyncIterator[dict[str, object]]:
    yield PREVIEW
    raise KeyError("secret")


async def making_what_is_no_json() -> AsyncIterator[dict[str, object]]:
    yield PREVIEW
    yield {"seconds": float("nan")}


async def failing_at_once() -> AsyncIterator[dict[str, object]]:
    raise ImageTooLarge("image is 20000×10; the largest side allowed is 14142.")
    yield {}


async def pausing() -> AsyncIterator[dict[str, object]]:
    yield PREVIEW
    await asyncio.sleep(0.3)
    yield OUTPUT


async def ending_cleanly_after_an_error() -> AsyncIterator[dict[str, object]]:
    """What must not be done."""
    yield PREVIEW
    yield {"detail": "the worker died", "error_type": "runner_disconnected"}


BY_PROMPT: dict[str, Events] = {
    made.__name__: made
    for made in (
        succeeding,
        pausing,
        failing_in_the_middle,
        failing_with_a_bug,
        making_what_is_no_json,
        failing_at_once,
        ending_cleanly_after_an_error,
    )
}


def application(events: Events | None = None, keep_alive_s: float = 10.0) -> ASGIApp:
    """Streams `events`, or what the prompt names."""

    async def stream(request: Request) -> EventStream:
        made = events or BY_PROMPT[(await request.json())["prompt"]]
        return EventStream(made(), keep_alive_s=0.05 if made is pausing else keep_alive_s)

    app = Starlette(routes=[Route(STREAM_PATH, stream, methods=["POST"])])
    answer_errors(app)
    return front_door(app, DoorSettings())


def raw_post(port: int, heard: Callable[[bytes], object] = len) -> tuple[bytes, bool]:
    """What the server sends until the body ends, and whether it ended by closing the connection.

    `heard` is told all that has come so far, each time that more comes.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"POST {STREAM_PATH} HTTP/1.1\r\nHost: box\r\nContent-Length: 0\r\n\r\n".encode())
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            heard(received)
            if received.endswith(b"\r\n0\r\n\r\n"):
                return received, False
    return received, True


class Comments:
    """Lets a stream wait until its client has so many comments."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self._there = wanted, threading.Event()

    def count(self, received: bytes) -> None:
        if received.count(b": keep-alive\n\n") >= self._wanted:
            self._there.set()

    async def came(self) -> None:
        assert await asyncio.to_thread(self._there.wait, 15)  # the client gives up after twenty


def test_an_event_is_one_line_of_ascii_json() -> None:
    assert event({"prompt": "█\n"}) == b'data: {"prompt":"\\u2588\\n"}\n\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"seconds": float("nan")})


def test_a_stream_that_succeeds_ends_with_the_last_chunk(serve: Serve) -> None:
    received, closed = raw_post(serve(application(succeeding)))
    assert not closed
    assert b"content-type: text/event-stream" in received
    assert b"x-fal-request-id: " in received
    assert b"cache-control: no-store" in received
    assert received.count(b"data: ") == 2


def test_after_an_error_the_connection_is_broken_off_without_the_last_chunk(serve: Serve) -> None:
    received, closed = raw_post(serve(application(failing_in_the_middle)))
    assert closed
    assert b'"error_type":"runner_disconnected"' in received
    assert b"connection: close" not in received.lower()  # with it JavaScript's client resolves


def test_a_bug_in_the_middle_is_told_without_its_message(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    received, closed = raw_post(serve(application(failing_with_a_bug)))
    assert closed
    assert b'"error_type":"internal_error"' in received
    assert b"secret" not in received
    assert "KeyError: 'secret'" in caplog.text


def test_while_nothing_happens_comments_keep_the_connection_alive(serve: Serve) -> None:
    comments = Comments(2)

    async def slow() -> AsyncIterator[dict[str, object]]:
        await comments.came()
        yield OUTPUT

    received, closed = raw_post(serve(application(slow, keep_alive_s=0.1)), comments.count)
    assert not closed
    assert received.count(b": keep-alive\n\n") >= 2
    assert received.index(b": keep-alive") < received.index(b"data: ")


def test_an_error_after_the_first_comment_is_an_event_as_well(serve: Serve) -> None:
    comments = Comments(1)

    async def late() -> AsyncIterator[dict[str, object]]:
        await comments.came()
        raise AuthError("the key was revoked.")
        yield {}

    received, closed = raw_post(serve(application(late, keep_alive_s=0.1)), comments.count)
    assert closed
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b'"error_type":"auth_error"' in received


@pytest.mark.parametrize("keep_alive_s", [10.0, 0.02])
def test_the_iterator_is_closed_when_the_client_goes_away(serve: Serve, keep_alive_s: float) -> None:
    started, closed = threading.Event(), threading.Event()

    async def endless() -> AsyncIterator[dict[str, object]]:
        try:
            yield PREVIEW
            started.set()
            await asyncio.sleep(3600)
        finally:
            closed.set()

    port = serve(application(endless, keep_alive_s))
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(f"POST {STREAM_PATH} HTTP/1.1\r\nHost: box\r\nContent-Length: 0\r\n\r\n".encode())
        assert started.wait(20)
        assert not closed.is_set()
    assert closed.wait(20)


# The official clients, unmodified.


def test_javascript_rejects_when_a_stream_fails_and_resolves_when_it_succeeds(serve: Serve) -> None:
    url = f"http://127.0.0.1:{serve(application())}/api/fal/proxy"
    told = fal_clients.run_js("stream.cjs", url, *BY_PROMPT)

    for prompt in ("succeeding", "pausing"):
        assert (told[prompt]["events"], told[prompt]["resolved"]) == ([PREVIEW, OUTPUT], OUTPUT)
        assert told[prompt]["requestId"]

    for prompt, error_type in (
        ("failing_in_the_middle", "runner_disconnected"),
        ("failing_with_a_bug", "internal_error"),
        ("making_what_is_no_json", "internal_error"),
    ):
        assert told[prompt]["events"][0] == PREVIEW
        assert told[prompt]["events"][1]["error_type"] == error_type
        assert told[prompt]["rejected"] == "ApiError"

    at_once = told["failing_at_once"]
    assert (at_once["events"], at_once["rejected"], at_once["status"]) == ([], "ValidationError", 422)
    assert at_once["body"]["detail"][0]["loc"] == ["body", "image_url"]

    # Why the connection is broken off: without that, an error is taken for the result.
    assert told["ending_cleanly_after_an_error"]["resolved"]["error_type"] == "runner_disconnected"


PYTHON_STREAMS = """
import json, os, fal_client
def streamed(prompt):
    events, raised = [], None
    try:
        for event in fal_client.stream("fal-ai/flux-kontext-lora", {"prompt": prompt}):
            events.append(event)
    except Exception as error:
        raised = type(error).__name__
    return {"events": events, "raised": raised}
print(json.dumps({prompt: streamed(prompt) for prompt in os.environ["PROMPTS"].split(",")}))
"""


def test_python_raises_when_a_stream_fails(serve: Serve, tmp_path: Path) -> None:
    """Through TLS with a certificate of `kontextd certs`: Python's client speaks nothing else."""
    files = write_certificates(tmp_path, ["127.0.0.1"])
    host = f"127.0.0.1:{serve(application(), files.leaf, files.leaf_key)}"
    variables = {
        "FAL_KEY": "id:secret",
        "FAL_RUN_HOST": host,
        "SSL_CERT_FILE": str(files.ca),
        "PROMPTS": ",".join(BY_PROMPT),
    }
    told = fal_clients.run_python(PYTHON_STREAMS, variables)
    for prompt in ("succeeding", "pausing"):
        assert told[prompt] == {"events": [PREVIEW, OUTPUT], "raised": None}
    assert told["failing_in_the_middle"]["raised"] == "RemoteProtocolError"
    assert told["failing_in_the_middle"]["events"][1]["error_type"] == "runner_disconnected"
    assert told["failing_at_once"] == {"events": [], "raised": "SSEError"}  # it does not show the body
