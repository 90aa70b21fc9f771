"""The virtual hosts on one port: which part of the API a request means. Knows names and prefixes; knows no endpoints.

fal's hosts come first, by their exact name; then a `queue.` in front of any name; then, at every other name, the path:
`/queue/…`, `/rest/…`, `/files/…`, a page of our own, and otherwise an endpoint to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from kontextd_server.wire.errors import BadRequest, NotFound

# A name or an IPv4 address, or an IPv6 address in brackets; docker's names hold underscores.
_NAME, _ADDRESS = r"(?P<name>[a-z0-9]([a-z0-9._-]{0,252}[a-z0-9])?)\.?", r"(?P<address>\[[0-9a-f:.]{2,45}\])"
_HOST = re.compile(rf"({_NAME}|{_ADDRESS})(:(?P<port>[0-9]{{1,5}}))?")


class Role(StrEnum):
    """The parts of the API: four are hosts of fal's, the last is what fal does not have."""

    RUN = "run"
    QUEUE = "queue"
    REST = "rest"
    FILES = "files"
    OWN = "own"  # health, metrics, docs


_BY_PREFIX = {"queue": Role.QUEUE, "rest": Role.REST, "files": Role.FILES}


@dataclass(frozen=True)
class HostNames:
    """fal's names; the second of `run` and of `queue` is where Python's client goes when the first does not answer.

    `plain` lists names of this box that begin with "queue." and still serve everything. `own_pages` are first parts of
    paths.
    """

    run: tuple[str, ...] = ("fal.run", "falrun.com")
    queue: tuple[str, ...] = ("queue.fal.run", "queue.falrun.com")
    rest: tuple[str, ...] = ("rest.fal.ai", "rest.alpha.fal.ai")
    files: tuple[str, ...] = ("v3.fal.media",)
    plain: tuple[str, ...] = ()
    own_pages: tuple[str, ...] = (
        "api",
        "health",
        "ready",
        "metrics",
        "docs",
        "redoc",
        "openapi.json",
        "favicon.ico",
        "ui",
        "kontextd",
    )

    @property
    def all(self) -> tuple[str, ...]:
        """Every name of fal's that is answered: what DNS and certificates have to cover."""
        return (*self.run, *self.queue, *self.rest, *self.files)

    def role_of(self, name: str) -> Role | None:
        """The role that is this whole host's, None at a plain name."""
        if name in self.plain:
            return None
        by_role = {Role.RUN: self.run, Role.QUEUE: self.queue, Role.REST: self.rest, Role.FILES: self.files}
        exact = next((role for role, names in by_role.items() if name in names), None)
        return exact or (Role.QUEUE if name.startswith("queue.") else None)


@dataclass(frozen=True)
class Host:
    """A host as in a URL: `name` in lower case, `port` None where the scheme's own."""

    name: str
    port: int | None = None

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}:{self.port}"


@dataclass(frozen=True)
class Place:
    """A role, and the path within it, which begins with a slash."""

    role: Role
    path: str

    @property
    def plain_path(self) -> str:
        """The path of the same place at a plain name: what the routes are written for."""
        return f"/{self.role}{self.path}" if self.role in _BY_PREFIX.values() else self.path


def parse_host(text: str) -> Host:
    """The value of a Host header. Raises `BadRequest`."""
    match = _HOST.fullmatch(text.lower())
    port = int(match["port"]) if match and match["port"] else None
    if not match or (port is not None and not 0 < port < 2**16):
        raise BadRequest(f"the Host {text[:200]!r} is not a name with an optional port.")
    return Host(match["name"] or match["address"], port)


def place(host: Host, path: str, names: HostNames) -> Place:
    """What a path at a host means. Raises `NotFound` for a path that the files host does not have."""
    first, slash, rest = path.removeprefix("/").partition("/")
    if first == ".well-known":  # the webhook keys, at every name
        return Place(Role.OWN, path)
    role = names.role_of(host.name)
    if role is Role.FILES and first != "files":
        raise NotFound(f"{host.name} has nothing at {path[:200]!r}; its files are under /files/.")
    if role is not None and role is not Role.FILES:
        return Place(role, path)
    if first in _BY_PREFIX:
        return Place(_BY_PREFIX[first], slash + rest)
    return Place(Role.OWN if first in ("", *names.own_pages) else Role.RUN, path)
