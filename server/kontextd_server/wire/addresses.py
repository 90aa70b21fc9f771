"""The URLs we hand out, rendered when they are read. Knows hosts, prefixes and proxies; knows no endpoints, no files.

In this order: the setting `public_url`; at a fal host its sister hosts; otherwise the scheme, host and prefix that the
reader used. X-Forwarded-* count only from proxies that are trusted. A call through our answer to the fal proxy
protocol is rendered for the address the proxy was reached at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.hosts import Host, HostNames, Role, parse_host

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_FILE_URL = re.compile(rf"https?://[^/?#]+{_PREFIX.pattern}?/files/(?P<key>[^?#]+)")
_MAX_URL = 4096
_UNIX = "unix"  # in `trusted_proxies`: whoever connects through a socket in the file system
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class AddressSettings:
    """`trusted_proxies` holds addresses, networks, and "unix". Raises `ValueError`, naming the value.

    uvicorn must run with `proxy_headers=False`: it would replace the peer's address by what the peer says.
    """

    public_url: str | None = None
    trusted_proxies: tuple[str, ...] = ()
    names: HostNames = field(default_factory=HostNames)

    def __post_init__(self) -> None:
        for proxy in self.trusted_proxies:
            if proxy != _UNIX:
                ip_network(proxy, strict=False)
        if self.public_url is not None:
            parse_origin(self.public_url)


@dataclass(frozen=True)
class Origin:
    """Where a reader reached us. `prefix` is "" or begins with a slash.

    As text it is kept with a request, for the URLs in its webhook; `parse_origin` reads it back.
    """

    scheme: str
    host: Host
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.prefix}"

    def at(self, name: str) -> str:
        """The same scheme and port at another host."""
        return f"{self.scheme}://{Host(name, self.host.port)}"


@dataclass(frozen=True)
class Bases:
    """The front of the URLs of each role, without a slash at the end."""

    run: str
    queue: str
    rest: str
    files: str

    def request_urls(self, app: str, request_id: str) -> dict[str, str]:
        response_url = f"{self.queue}/{app}/requests/{request_id}"
        return {
            "response_url": response_url,
            "status_url": f"{response_url}/status",
            "cancel_url": f"{response_url}/cancel",
        }

    def file_url(self, key: str) -> str:
        """Never a query: Python's client appends a path to it."""
        return f"{self.files}/files/{quote(key)}"


class Said(NamedTuple):
    """What counts of where a request says it was sent to, as text that nobody has looked at yet."""

    scheme: str
    host: str
    port: str = ""
    prefix: str = ""


def origin_of(scope: Scope, settings: AddressSettings) -> Origin:
    """Where the reader of this answer reached us. Raises `BadRequest` for a Host, or a trusted proxy's word, that is
    no address, and for a second Host."""
    return said_origin(said_of(scope, settings))


def said_of(scope: Scope, settings: AddressSettings) -> Said:
    """All that `origin_of` looks at, and nothing that is not believed. Raises `BadRequest` for a second Host."""
    headers = Headers(scope=scope)
    scheme, host = str(scope["scheme"]), _host(headers) or _server(scope)
    client = scope.get("client")
    if not settings.trusted_proxies or not _is_trusted(client[0] if client else "", settings.trusted_proxies):
        return Said(scheme, host)
    forwarded = {name: value for name, value in scope["headers"] if name.startswith(b"x-forwarded-")}
    return Said(
        scheme=_last(forwarded, b"x-forwarded-proto") or scheme,
        host=_last(forwarded, b"x-forwarded-host") or host,
        port=_last(forwarded, b"x-forwarded-port"),
        prefix=_last(forwarded, b"x-forwarded-prefix").rstrip("/"),
    )


def said_origin(said: Said) -> Origin:
    """Raises `BadRequest`."""
    host = parse_host(said.host)
    if said.scheme not in _DEFAULT_PORTS:
        raise BadRequest(f"X-Forwarded-Proto is {said.scheme[:50]!r}; it must be http or https.")
    if not _PREFIX.fullmatch(said.prefix):
        raise BadRequest(f"X-Forwarded-Prefix is {said.prefix[:200]!r}; it must be a path like /kontext.")
    if said.port and host.port is None:
        host = parse_host(f"{host.name}:{said.port}")
    return Origin(said.scheme, _without_default_port(said.scheme, host), said.prefix)


def parse_origin(url: str) -> Origin:
    """An address like https://box:8443/prefix. Raises `ValueError`, naming it."""
    parts = urlsplit(url)
    if (
        parts.scheme not in _DEFAULT_PORTS
        or parts.query
        or parts.fragment
        or not _PREFIX.fullmatch(parts.path.rstrip("/"))
    ):
        raise ValueError(f"{url!r} is no address to be reached at; use one like https://kontext.studio.example/prefix")
    try:
        host = parse_host(parts.netloc)
    except BadRequest as error:
        raise ValueError(f"{url!r}: {error}") from error
    return Origin(parts.scheme, _without_default_port(parts.scheme, host), parts.path.rstrip("/"))


def bases_for(origin: Origin, settings: AddressSettings) -> Bases:
    """The front of the URLs that this reader can use."""
    names = settings.names
    if settings.public_url is not None:
        return _plain(str(parse_origin(settings.public_url)))
    host, role = origin.host.name, names.role_of(origin.host.name)
    if role is None:
        return _plain(str(origin))
    if host not in names.all:  # queue.box.lan, of box.lan
        plain = _plain(origin.at(host.removeprefix("queue.")))
        return Bases(plain.run, origin.at(host), plain.rest, plain.files)
    pairs = {Role.RUN: names.run, Role.QUEUE: names.queue}
    family = pairs[role].index(host) if role in pairs else 0
    return Bases(
        run=origin.at(_nth(names.run, family)),
        queue=origin.at(_nth(names.queue, family)),
        rest=origin.at(host if role is Role.REST else names.rest[0]),
        files=origin.at(names.files[0]),
    )


def possible_file_key(url: str) -> str | None:
    """The key that a URL would have as a file of ours, None where it cannot be one.

    The host is not looked at: people upload by one of a box's names and send what they got to another. Keys cannot be
    guessed, so one that is in the store is the file.
    """
    match = _FILE_URL.fullmatch(url) if len(url) <= _MAX_URL else None  # a data URI may have a hundred megabytes
    return unquote(match["key"]) if match else None


def _plain(base: str) -> Bases:
    return Bases(run=base, queue=f"{base}/queue", rest=f"{base}/rest", files=base)


def _nth(names: tuple[str, ...], index: int) -> str:
    return names[min(index, len(names) - 1)]


@lru_cache(maxsize=1000)
def _is_trusted(peer: str, proxies: tuple[str, ...]) -> bool:
    """`peer` is "" at a socket in the file system."""
    if not peer:
        return _UNIX in proxies
    try:
        address = ip_address(peer)
    except ValueError:  # a server that names its peers otherwise
        return False
    plain = (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address
    return any(plain in ip_network(proxy, strict=False) for proxy in proxies if proxy != _UNIX)


def _host(headers: Headers) -> str | None:
    """RFC 9112 wants a 400 for more than one: a proxy in front may have gone by another than we would."""
    hosts = headers.getlist("host")
    if len(hosts) > 1:
        told = ", ".join(repr(host[:100]) for host in hosts[:3])
        raise BadRequest(f"the header Host is there {len(hosts)} times: {told}; send it once.")
    return hosts[0] if hosts else None


def _last(forwarded: Mapping[bytes, bytes], name: bytes) -> str:
    """What the nearest proxy said: a proxy that does not overwrite the header appends to it, or adds another."""
    return forwarded.get(name, b"").rpartition(b",")[2].strip().decode("latin-1")


def _server(scope: Scope) -> str:
    """For HTTP/1.0, which knows no Host."""
    name, port = scope.get("server") or ("localhost", None)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}" if port else "localhost"


def _without_default_port(scheme: str, host: Host) -> Host:
    return Host(host.name) if host.port == _DEFAULT_PORTS[scheme] else host
