"""URLs, by one parser: what is checked is what is connected to and asked for. Pure; knows no network.

Everything after this module works with the parts of `Target`; nothing parses the text a second time, so that no two
readers can understand it differently.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from kontextd_server.fetch.errors import InvalidReference

MAX_URL = 8192  # characters
_MAX_SHOWN = 200
_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(:[0-9]*)?")  # no user, no zone ("%eth0") in an address
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")  # a backslash is a slash to browsers and none to others
_KEPT = "%/?:@!$&'()*+,;=~-._[]|"  # in a path or a query; everything else is percent-encoded


@dataclass(frozen=True)
class Target:
    """Where to connect and what to ask for, all in ASCII. `host` is a name without a final dot, or a bare address."""

    scheme: str
    host: str
    port: int
    resource: str  # path and query

    def __str__(self) -> str:
        """For messages: without the query."""
        return f"{self.scheme}://{self.authority}{self.resource.partition('?')[0]}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.resource}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """Who is asked."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """For the `Host` field."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port_unless_default is None else f"{host}:{self.port}"

    @property
    def port_unless_default(self) -> int | None:
        return None if self.port == _PORTS[self.scheme] else self.port


def scheme_of(text: str) -> str | None:
    """The scheme of what looks like a URL, in lower case; None for anything else."""
    found = _SCHEME.match(text.lstrip())
    return found[1].lower() if found else None


def parse(text: str) -> Target:
    """Raises `InvalidReference` for what is no plain http or https URL."""
    text = text.strip()
    shown = _shown(text)
    if len(text) > MAX_URL:
        raise InvalidReference(f"the URL {shown} has {len(text)} characters; {MAX_URL} are allowed.")
    if _FORBIDDEN.search(text):
        raise InvalidReference(f"the URL {shown} holds a backslash or a control character. Percent-encode it.")
    try:
        parts = urlsplit(text)
        scheme, port = parts.scheme.lower(), parts.port
    except ValueError as error:
        raise InvalidReference(f"{shown} is no URL: {error}.") from error
    if scheme not in _PORTS:
        raise InvalidReference(f"{shown} has the scheme {scheme or 'nothing'!r}; use http, https or data.")
    if "@" in parts.netloc:
        raise InvalidReference(f"the URL {shown} holds a user name or password, which are not sent. Leave them out.")
    if not _AUTHORITY.fullmatch(parts.netloc):
        raise InvalidReference(f"the URL {shown} has no valid host and port. Check its spelling.")
    if port == 0:
        raise InvalidReference(f"the URL {shown} names port 0. Use the port that the server listens on.")
    return Target(scheme, _host(parts, shown), port or _PORTS[scheme], _resource(parts))


def without_query(reference: str) -> str:
    """What a message or a log may show of an input: a query often holds a signature, a data URI the input itself."""
    if scheme_of(reference) == "data":
        return "a data URI"
    return re.split(r"[?#]", reference.strip(), maxsplit=1)[0][:_MAX_SHOWN]


def follow(target: Target, location: str) -> Target:
    """Where a redirect leads from `target`; a relative one stays with the same server."""
    try:
        joined = urljoin(target.url, location.strip())
    except ValueError as error:
        raise InvalidReference(f"{target} redirects to what is no URL: {error}.") from error
    return parse(joined)


def _host(parts: SplitResult, shown: str) -> str:
    written = parts.hostname or ""
    if parts.netloc.startswith("["):
        try:
            return str(ipaddress.IPv6Address(written))
        except ValueError as error:
            raise InvalidReference(f"the URL {shown} has no valid IPv6 address between its brackets.") from error
    try:
        host = (written if written.isascii() else written.encode("idna").decode("ascii")).lower().removesuffix(".")
    except UnicodeError as error:
        raise InvalidReference(f"the host of {shown} is no name: {error}.") from error
    if not _NAME.fullmatch(host):
        raise InvalidReference(f"the URL {shown} has no valid host name. Check its spelling.")
    return host


def _resource(parts: SplitResult) -> str:
    path = quote(parts.path or "/", safe=_KEPT, errors="replace")
    query = quote(parts.query, safe=_KEPT, errors="replace")
    return f"{path}?{query}" if query else path


def _shown(text: str) -> str:
    """A URL in a message: cut at its query, without whoever may be named before an `@`, and short."""
    begun = re.split(r"[?#]", text, maxsplit=1)[0]
    return repr(re.sub(r"(?<=//)[^/@]*@", "…@", begun)[:200])
