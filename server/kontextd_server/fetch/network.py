"""Connections that go where was checked, and end in time: a network backend for httpcore2. Knows no HTTP.

A name is resolved once, every address of the answer is checked, and the connection is made to one of just these: DNS
that answers otherwise the second time is never asked a second time.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpcore2

from kontextd_server.fetch.addresses import Address, as_address
from kontextd_server.fetch.errors import DownloadFailed, DownloadTimedOut

Resolver = Callable[[str, int], Sequence[Address]]
Admit = Callable[[str, Address], None]  # raises where the host may not be reached at the address

_TRIED = 3  # addresses of one name
_SLICE_S = 0.5  # of waiting for bytes, after which somebody may want to end it
_LEAST_S = 0.01  # a socket timeout of 0 would mean "do not wait at all"
_PIECE_BYTES = 2**13  # about what a socket takes when it takes anything: each piece waits once


class Deadline:
    """The end of the whole of a fetch, redirects and repetitions included.

    `on_wait` is called now and then while nothing comes; what it raises ends the fetch.
    """

    def __init__(self, total_s: float, on_wait: Callable[[], None] | None = None) -> None:
        self.total_s = total_s
        self.on_wait = on_wait or _nothing
        self.ends = time.monotonic() + total_s

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def bounded_s(self, timeout_s: float | None) -> float:
        """The shorter of a timeout and what is left. Raises `DownloadTimedOut` where nothing is."""
        left_s = self.left_s()
        if left_s <= 0:
            raise DownloadTimedOut(f"it took longer than the {self.total_s:g} s allowed.")
        return max(_LEAST_S, left_s if timeout_s is None else min(left_s, timeout_s))


def system_resolver(host: str, port: int) -> Sequence[Address]:
    """The addresses of a name, by the system. Raises `OSError` where it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A zone ("fe80::1%eth0") belongs to the machine that answered, not to the address.
    return [ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in found]


def resolve(resolver: Resolver, host: str, port: int, timeout_s: float) -> Sequence[Address]:
    """The distinct addresses of a host, in the resolver's order. Raises `DownloadFailed`, `DownloadTimedOut`.

    getaddrinfo(3) has no timeout, so a thread asks; one that hangs is left to the system's own limit.
    """
    if literal := as_address(host):
        return [literal]
    answer: list[Sequence[Address] | OSError | UnicodeError] = []

    def ask() -> None:
        try:
            answer.append(resolver(host, port))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name="kontextd-resolve", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not answer:
        raise DownloadTimedOut(f"the name {host} was not resolved within {timeout_s:.0f} s.", transient=True)
    if isinstance(answer[0], Exception):
        told = getattr(answer[0], "strerror", None) or str(answer[0])
        raise DownloadFailed(f"the name {host} cannot be resolved: {told}. Check its spelling.", transient=True)
    if not answer[0]:
        raise DownloadFailed(f"the name {host} has no address. Check its spelling.")
    return list(dict.fromkeys(answer[0]))


class CheckedNetwork(httpcore2.NetworkBackend):
    """Makes the connections of one fetch. `admit` judges each address of a host."""

    def __init__(self, deadline: Deadline, resolver: Resolver, admit: Admit) -> None:
        self.deadline = deadline
        self.resolver = resolver
        self.admit = admit
        self.sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = resolve(self.resolver, host, port, self.deadline.bounded_s(timeout))
        for address in addresses:
            self.admit(host, address)
        error: Exception | None = None
        for address in addresses[:_TRIED]:
            try:
                stream = self.sockets.connect_tcp(str(address), port, self.deadline.bounded_s(timeout))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as failed:
                error = error or failed
            else:
                return TimedStream(stream, self.deadline)
        raise error or httpcore2.ConnectError("no address")


class TimedStream(httpcore2.NetworkStream):
    """A connection none of whose operations outlasts the deadline, however slowly the bytes drip, either way."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self.stream = stream
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        ends = time.monotonic() + self.deadline.bounded_s(timeout)
        while True:
            left_s = ends - time.monotonic()
            try:
                return self.stream.read(max_bytes, min(_SLICE_S, max(_LEAST_S, left_s)))
            except httpcore2.ReadTimeout:
                if left_s <= _SLICE_S:
                    raise
            self.deadline.on_wait()

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for begin in range(0, len(buffer), _PIECE_BYTES):
            self.stream.write(buffer[begin : begin + _PIECE_BYTES], self.deadline.bounded_s(timeout))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secured = self.stream.start_tls(ssl_context, server_hostname, self.deadline.bounded_s(timeout))
        return TimedStream(secured, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        """Any: the interface of httpcore2 says so."""
        return self.stream.get_extra_info(info)


def _nothing() -> None:
    """Nobody waits along."""
