"""Who calls: keys and tokens to an identity. Knows credentials; finds keys through a `KeyBook`, knows no store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection

from kontextd_server.wire.errors import AuthError, NotPermitted
from kontextd_server.wire.hosts import Role
from kontextd_server.wire.tokens import Audience, Claims, TokenSigner, aliases, is_token

TOKEN_PARAMETER = "fal_jwt_token"
TOKEN_TYPE = "Bearer"  # of tokens for the files host
_AUTHORIZATION = re.compile(r"(?P<scheme>[A-Za-z]+) +(?P<secret>[\x21-\x7e]{1,4096})")
_ROLES = {Audience.INFER: (Role.RUN, Role.QUEUE), Audience.FILES: (Role.FILES,)}


class KeyScope(StrEnum):
    """What a key may do."""

    INFER = "infer"
    ADMIN = "admin"  # everything, and see everybody's requests


class Key(Protocol):
    """A key that is not revoked. `name` is its owner, which rotation keeps."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def scopes(self) -> frozenset[str]: ...


class KeyBook(Protocol):
    """Where keys are kept, as hashes. Revoked ones are not found."""

    def find(self, plain: str) -> Key | None:
        """By the key itself. How long that takes must say nothing of the keys that exist."""

    def by_id(self, key_id: str) -> Key | None:
        """By the id that tokens carry."""


@dataclass(frozen=True)
class Identity:
    """A caller. `apps` None means every endpoint; a token names its aliases."""

    owner: str
    key_id: str
    scopes: frozenset[KeyScope]
    apps: tuple[str, ...] | None = None

    def require(self, scope: KeyScope) -> None:
        """Raises `NotPermitted`. An admin may do everything."""
        if not self.scopes & {scope, KeyScope.ADMIN}:
            raise NotPermitted(
                f"the key {self.owner!r} has not the scope {scope!r}. Its operator can make one that has."
            )

    def require_app(self, alias: str) -> None:
        """Raises `NotPermitted` for an endpoint that a token was not made for."""
        if self.apps is not None and alias not in self.apps:
            raise NotPermitted(f"the token is for {', '.join(self.apps)}, not for {alias}. Ask for one with it.")

    def may_see(self, owner: str) -> bool:
        """Whether a request of that owner exists for this caller; where not, the answer is a 404."""
        return owner == self.owner or KeyScope.ADMIN in self.scopes


class Authenticator:
    """Turns the credential of a request into an identity."""

    def __init__(self, book: KeyBook, signer: TokenSigner) -> None:
        self.book, self.signer = book, signer

    def identify(self, connection: HTTPConnection, role: Role, now_s: float) -> Identity:
        """Raises `AuthError`: none, a wrong one, a revoked one, an expired one, one for another part of the API.

        It takes as long as the `KeyBook` does: off the event loop, unless that one keeps its keys in memory.
        """
        secret, in_url = credential_of(connection)
        if is_token(secret):
            return self._by_token(self.signer.verify(secret, now_s), role)
        if in_url:
            raise AuthError(f"{TOKEN_PARAMETER} takes a token of POST /tokens/, never a key.")
        key = self.book.find(secret)
        if key is None:
            raise AuthError("the key is not valid. Check FAL_KEY; the operator makes keys with: kontextd keys create.")
        return Identity(key.name, key.id, frozenset(map(KeyScope, key.scopes)))

    def _by_token(self, claims: Claims, role: Role) -> Identity:
        if role not in _ROLES[claims.audience]:
            raise AuthError(f"the token is not for {role} calls. Use a key.")
        key = self.book.by_id(claims.key_id)
        if key is None:
            raise AuthError("the key of this token was revoked.")
        apps = claims.apps if claims.audience is Audience.INFER else ()
        return Identity(key.name, key.id, frozenset({KeyScope.INFER}), apps)


def credential_of(connection: HTTPConnection) -> tuple[str, bool]:
    """The key or token of a request, and whether it came in the URL. Raises `AuthError`."""
    values = connection.headers.getlist("authorization")
    if len(values) > 1:
        raise AuthError("the header Authorization is there more than once.")
    if values:
        return parse_authorization(values[0]), False
    query = parse_qs(connection.scope["query_string"].decode("latin-1"))
    if TOKEN_PARAMETER in query:
        return query[TOKEN_PARAMETER][0], True
    raise AuthError("this call needs a key: Authorization: Key <key>.")


def parse_authorization(value: str) -> str:
    """The secret of `Key <key>` or `Bearer <key or token>`. Raises `AuthError`."""
    match = _AUTHORIZATION.fullmatch(value.strip())
    if match is None or match["scheme"].lower() not in ("key", "bearer"):
        raise AuthError("the header Authorization must be: Key <key>, or Bearer <key>.")
    return match["secret"]


def infer_token(signer: TokenSigner, identity: Identity, allowed_apps: Sequence[str], expires_at: int) -> str:
    """A token for `fal_jwt_token`. Raises `NotPermitted` if the caller may not infer, `Invalid` for too many apps."""
    identity.require(KeyScope.INFER)
    return signer.issue(Claims(identity.key_id, Audience.INFER, expires_at, aliases(allowed_apps)))


def files_token(signer: TokenSigner, identity: Identity, expires_at: int) -> str:
    """A token for uploads at the files host."""
    return signer.issue(Claims(identity.key_id, Audience.FILES, expires_at))
