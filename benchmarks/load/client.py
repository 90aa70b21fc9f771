"""An HTTP client that takes little time of its own: one connection, one call at a time. Knows asyncio; knows no server.

Answers are put together by httptools; a stream is read event by event, as they come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httptools


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """Kept alive between calls. Raises `ConnectionError` for a call that the server breaks off."""

    _parser: httptools.HttpResponseParser  # of the answer that is awaited

    def __init__(self, head: str) -> None:
        self._head = head
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the answer is complete
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, port: int, headers: dict[str, str]) -> Connection:
        told = {"Host": f"127.0.0.1:{port}", "Accept": "*/*", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        made = await asyncio.get_running_loop().create_connection(lambda: cls(head), "127.0.0.1", port)
        return made[1]

    async def call(self, method: str, path: str, body: bytes = b"") -> Answer:
        self._send(method, path, body)
        body = b"".join([chunk async for chunk in self._answer()])
        return Answer(self._parser.get_status_code(), body)

    async def events(self, path: str) -> AsyncIterator[bytes]:
        """What stands after `data: ` in each server-sent event, to the end of the stream."""
        self._send("GET", path, b"")
        text = b""
        async for chunk in self._answer():
            *events, text = (text + chunk).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event.removeprefix(b"data: ")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _send(self, method: str, path: str, body: bytes) -> None:
        self._parser = httptools.HttpResponseParser(self)
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        assert self._transport is not None
        self._transport.write(f"{method} {path} HTTP/1.1\r\n{self._head}{kind}\r\n".encode() + body)

    async def _answer(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
        if self._transport is None:
            raise ConnectionError("the server closed the connection in the midst of an answer")

    # What asyncio and httptools call.

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._chunks.put_nowait(None)

    def on_body(self, body: bytes) -> None:
        self._chunks.put_nowait(body)

    def on_message_complete(self) -> None:
        self._chunks.put_nowait(None)
