"""Short-lived tokens instead of a key: for streams from browsers, and for the files host. Knows signatures; no store.

A token is a JWT (RFC 7519, HS256). It names its key, so that revoking the key ends its tokens.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kontextd_server.wire.errors import AuthError, FieldError, Invalid
from kontextd_server.wire.key_files import load_or_create

_MAX_TOKEN = 4096  # characters: it goes into URLs and headers
_NAMESPACES = {"workflows", "comfy"}  # the clients take the two parts after these for owner and alias


class Audience(StrEnum):
    """What a token is good for."""

    INFER = "infer"  # run, stream and queue calls of `apps`
    FILES = "files"  # uploads at the files host


@dataclass(frozen=True)
class Claims:
    """`apps` holds aliases; empty means none. `expires_at` is in seconds since 1970."""

    key_id: str
    audience: Audience
    expires_at: int
    apps: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenSigner:
    """Issues and verifies. All processes of one installation have the same secret."""

    secret: bytes

    @classmethod
    def from_file(cls, path: Path) -> TokenSigner:
        """The secret of a file, which is made where there is none."""
        return cls(load_or_create(path, lambda: secrets.token_bytes(32)))

    def issue(self, claims: Claims) -> str:
        """Raises `Invalid` for so many apps that `verify` would not take the token."""
        told = {"key": claims.key_id, "aud": claims.audience, "exp": claims.expires_at, "apps": claims.apps}
        signed = f"{_HEADER}.{_encode(json.dumps(told).encode())}"
        token = f"{signed}.{self._signature(signed)}"
        if len(token) > _MAX_TOKEN:
            why = f"A token for all of these would have {len(token)} characters, over {_MAX_TOKEN}. Name fewer apps"
            raise Invalid([FieldError(("body", "allowed_apps"), why, "sequence_too_long")])
        return token

    def verify(self, token: str, now_s: float) -> Claims:
        """Raises `AuthError` for a token that is not ours, or is no longer valid."""
        signed, _, signature = token[:_MAX_TOKEN].rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            raise AuthError("the token is not valid. Ask for a new one.")
        told = json.loads(_decode(signed.partition(".")[2]))  # signed, so it is what `issue` made
        if told["exp"] <= now_s:
            raise AuthError("the token has expired. Ask for a new one.")
        return Claims(told["key"], Audience(told["aud"]), told["exp"], tuple(told["apps"]))

    def _signature(self, signed: str) -> str:
        return _encode(hmac.digest(self.secret, signed.encode(), hashlib.sha256))


def is_token(text: str) -> bool:
    """Whether a credential is one of our tokens, or a key."""
    return text.startswith(f"{_HEADER}.")


def aliases(allowed_apps: Iterable[str]) -> tuple[str, ...]:
    """What `allowed_apps` means: the clients send an alias; what a token provider is given is `owner/alias/stream`."""
    return tuple(sorted({_alias(app) for app in allowed_apps}))


def _alias(app: str) -> str:
    parts = app.strip("/").split("/")
    parts = parts[1:] if parts[0] in _NAMESPACES else parts
    return parts[1] if len(parts) > 1 else parts[0]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


_HEADER = _encode(b'{"alg":"HS256","typ":"JWT"}')
