"""uvicorn's httptools protocol with the bounds that it lacks. Knows bytes; knows no application.

Without them anybody, key or no key, can fill the memory with a header that never ends, put a second request into a
body, or hold connections for ever. h11, which is read by where httptools is missing, has all but the last of its own.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# As h11's, and well over fal's longest headers; what one read of the socket brings comes on top.
MAX_HEADER_BYTES = 65_536
_TCP_INFO_BYTES_ACKED = slice(120, 128)  # tcpi_bytes_acked of linux/tcp.h, since Linux 4.1


class _Part(enum.Enum):
    """Of a request, what comes next. Trailers belong to the body."""

    REQUEST = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


@dataclass
class _Stillness:
    """For how long a mark has been as it is."""

    mark: Hashable = None
    since: float = 0.0

    def seconds(self, mark: Hashable, now: float) -> float:
        """0 where there is no mark."""
        if mark is None or mark != self.mark:
            self.mark, self.since = mark, now
        return now - self.since


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and closes where headers or trailers do not end in time, and reads over `Upgrade`.

    Whoever serves calls `give_up_if_stalled` about once a second.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: uvicorn's own arguments
        super().__init__(*args, **kwargs)
        self._part = _Part.REQUEST
        self._bytes_of_no_use = 0  # since the last head, byte of a body, or end of a body
        self._reads = self._heads = 0
        self._to_read, self._to_write = _Stillness(), _Stillness()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but for `Upgrade` and the bound."""
        self._unset_keepalive_if_required()
        self._reads += 1
        self._bytes_of_no_use += len(data)
        try:
            self._read(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse("Invalid HTTP request received.")
            return
        if self._bytes_of_no_use > MAX_HEADER_BYTES:
            what = "trailers" if self._part is _Part.BODY else "headers"
            self._refuse(f"The {what} are longer than the {MAX_HEADER_BYTES} bytes allowed.")

    def on_message_begin(self) -> None:
        self._part = _Part.HEAD
        self._heads += 1
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are left out: the application has the headers by then, and may not have been meant to have these."""
        if self._part is _Part.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # to be read again, or CONNECT
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError("This is no proxy.")
            return
        self._part, self._bytes_of_no_use = _Part.BODY, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes_of_no_use = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._part, self._bytes_of_no_use = _Part.REQUEST, 0
        super().on_message_complete()

    def give_up_if_stalled(self, now: float, head_s: float, stall_s: float) -> None:
        """Break off where the client owes a head for `head_s`, or has sent or taken nothing that it owes for `stall_s`.

        It owes nothing while its answer is being made. An idle connection has uvicorn's own time.
        """
        awaited = self._awaited()
        longest_s = stall_s if self._part is _Part.BODY else head_s
        unread_s = self._to_read.seconds(awaited, now)
        unwritten_s = self._to_write.seconds(self._taken(), now)
        if unread_s > longest_s or unwritten_s > stall_s:
            self.transport.abort()

    def _read(self, data: bytes) -> None:
        """A server may ignore `Upgrade` (RFC 9110, section 7.8): its request is read again without it."""
        rest = memoryview(data)
        while True:
            try:
                return self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]  # what comes after the head
                self._read_head_without_upgrade()

    def _read_head_without_upgrade(self) -> None:
        """By a new parser, because the old one takes what follows for another request."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as uvicorn's; httptools before 0.6.3 is so by itself
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _refuse(self, why: str) -> None:
        """Answer 400 where nothing else is being answered, and close."""
        if self.transport.is_closing():
            return
        is_answered = self.cycle is None or self.cycle.response_complete
        is_own = self._part is _Part.BODY and not self.pipeline and self.cycle and not self.cycle.response_started
        if (is_answered and self._part is not _Part.BODY) or is_own:
            self.send_400_response(why)
        else:
            self.transport.close()

    def _awaited(self) -> Hashable:
        """What the client owes, told apart from what it owed before."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or self.pipeline or self.transport.is_closing():
            return None
        if self._part is _Part.BODY:
            return None if is_answering and self.cycle.waiting_for_100_continue else (self._part, self._reads)
        return None if is_answering or self.timeout_keep_alive_task else (self._part, self._heads)

    def _taken(self) -> Hashable:
        """What the client has taken, as far as that can be told, while there is more to send."""
        waiting = self.transport.get_write_buffer_size()
        if waiting == 0 or sys.platform != "linux":
            return waiting or None
        try:
            told = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except OSError:  # it is being closed
            return waiting
        return bytes(told[_TCP_INFO_BYTES_ACKED])
