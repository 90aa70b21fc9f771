"""Who calls, without asking the database each time. Knows keys and how long they are remembered; knows no routes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.requests import Request

from kontextd_server.api.threads import OffLoop
from kontextd_server.api.together import Together
from kontextd_server.store import ApiKey
from kontextd_server.store.keys import ApiKeys
from kontextd_server.wire.auth import Authenticator, Identity, KeyScope, credential_of
from kontextd_server.wire.hosts import Role
from kontextd_server.wire.tokens import TokenSigner, is_token
from kontextd_server.wire.virtual_hosts import context_of

_MAX_REMEMBERED = 10_000


@dataclass
class Remembered:
    """A good key. `identity`: whom it lets in, once that was found out."""

    key: ApiKey
    at_s: float
    identity: Identity | None = None


class RememberedKeys:
    """Good keys of the store, remembered for a while by their hash. Wrong ones never are."""

    def __init__(self, keys: ApiKeys, memory_s: float) -> None:
        self.keys, self._memory_s = keys, memory_s
        self._remembered: dict[bytes, Remembered] = {}

    def recall(self, plain: str) -> Remembered | None:
        """One that was looked up a moment ago."""
        remembered = self._remembered.get(_digest(plain))
        return remembered if remembered and time.monotonic() - remembered.at_s < self._memory_s else None

    def look_up(self, plains: Collection[str]) -> Mapping[str, Remembered]:
        """The good ones of several. It asks the store for each: in a thread, then."""
        found = {plain: self._look_up(plain) for plain in plains}
        return {plain: remembered for plain, remembered in found.items() if remembered is not None}

    def _look_up(self, plain: str) -> Remembered | None:
        at_s = time.monotonic()  # before the look: a key that is revoked during it is not good for longer
        key = self.keys.find(plain)
        if key is None:
            self._remembered.pop(_digest(plain), None)
            return None
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        remembered = self._remembered[_digest(plain)] = Remembered(key, at_s)
        return remembered


@dataclass(frozen=True)
class _Found:
    """The book for one credential that is no token, and was looked up already."""

    key: ApiKey | None

    def find(self, plain: str) -> ApiKey | None:
        return self.key

    def by_id(self, key_id: str) -> None:
        return None


class Gate:
    """Lets callers in."""

    def __init__(self, keys: RememberedKeys, signer: TokenSigner, off_loop: OffLoop) -> None:
        self._keys, self._signer, self._off_loop = keys, signer, off_loop
        self._by_token = Authenticator(keys.keys, signer)
        self._asked: Together[str, Remembered] = Together(self._look_up)

    async def caller(self, request: Request) -> Identity:
        """Who calls, with leave to use this part of the API and this endpoint. Raises `AuthError` and its kinds."""
        context = context_of(request)
        identity = await self._identify(request, context.role)
        identity.require(KeyScope.INFER)
        if context.call is not None:
            identity.require_app(context.call.app.partition("/")[2])
        return identity

    async def _identify(self, request: Request, role: Role) -> Identity:
        secret, in_url = credential_of(request)
        if in_url or is_token(secret):
            return await self._off_loop.read(self._by_token.identify, request, role, time.time())
        # When a key that many use is forgotten, all of them ask at once: together, that is one call of the store.
        remembered = self._keys.recall(secret) or await self._asked.get(secret)
        if remembered is not None and remembered.identity is not None:
            return remembered.identity
        book = _Found(None if remembered is None else remembered.key)
        identity = Authenticator(book, self._signer).identify(request, role, time.time())
        if remembered is not None:
            remembered.identity = identity
        return identity

    async def _look_up(self, plains: Collection[str]) -> Mapping[str, Remembered]:
        return await self._off_loop.read(self._keys.look_up, plains)


def _digest(plain: str) -> bytes:
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()
