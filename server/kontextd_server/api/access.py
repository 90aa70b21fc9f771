"""Who calls, without asking the database each time. Knows keys and how long they are remembered; knows no routes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from starlette.requests import Request

from kontextd_server.api.threads import OffLoop
from kontextd_server.store import ApiKey
from kontextd_server.store.keys import ApiKeys
from kontextd_server.wire.auth import Authenticator, Identity, KeyScope, credential_of
from kontextd_server.wire.hosts import Role
from kontextd_server.wire.tokens import TokenSigner
from kontextd_server.wire.virtual_hosts import context_of

_MAX_REMEMBERED = 10_000


@dataclass(frozen=True)
class _Remembered:
    key: ApiKey
    at_s: float


class RememberedKeys:
    """The store's keys as a `KeyBook`. Good keys are remembered for a while, by their hash; wrong ones never.

    `find` asks the store unless the key is fresh, and `by_id` always does: in a thread, then.
    """

    def __init__(self, keys: ApiKeys, memory_s: float) -> None:
        self._keys, self._memory_s = keys, memory_s
        self._remembered: dict[bytes, _Remembered] = {}

    def is_fresh(self, plain: str) -> bool:
        """Whether `find` answers from memory."""
        return self._recall(plain, self._memory_s) is not None

    def find(self, plain: str) -> ApiKey | None:
        remembered = self._recall(plain, self._memory_s)
        if remembered is not None:
            return remembered.key
        key = self._keys.find(plain)
        self._remember(plain, key)
        return key

    def by_id(self, key_id: str) -> ApiKey | None:
        return next((key for key in self._keys.all() if key.id == key_id and key.revoked_at is None), None)

    def _recall(self, plain: str, within_s: float) -> _Remembered | None:
        remembered = self._remembered.get(_digest(plain))
        return remembered if remembered and time.monotonic() - remembered.at_s < within_s else None

    def _remember(self, plain: str, key: ApiKey | None) -> None:
        if key is None:
            self._remembered.pop(_digest(plain), None)
            return
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[_digest(plain)] = _Remembered(key, time.monotonic())


class Gate:
    """Lets callers in."""

    def __init__(self, keys: RememberedKeys, signer: TokenSigner, off_loop: OffLoop) -> None:
        self._keys, self._off_loop = keys, off_loop
        self._authenticator = Authenticator(keys, signer)

    async def caller(self, request: Request) -> Identity:
        """Who calls, with leave to use this part of the API and this endpoint. Raises `AuthError` and its kinds."""
        context = context_of(request)
        identity = await self._identify(request, context.role)
        identity.require(KeyScope.INFER)
        if context.call is not None:
            identity.require_app(context.call.app.partition("/")[2])
        return identity

    async def _identify(self, request: Request, role: Role) -> Identity:
        secret, _ = credential_of(request)
        now_s = time.time()
        if self._keys.is_fresh(secret):
            return self._authenticator.identify(request, role, now_s)
        return await self._off_loop.read(self._authenticator.identify, request, role, now_s)


def _digest(plain: str) -> bytes:
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()
