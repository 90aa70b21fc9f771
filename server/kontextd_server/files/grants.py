"""Upload grants: unguessable, expiring leave to write one file, carried by its URL. Knows HMAC; stores nothing.

A grant is `<payload>.<HMAC-SHA256 of it>`, both in base64url: every process that holds the secret can check it, and
no table of grants has to be kept. It says all that the upload needs, so that it may arrive without an account.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kontextd_server.files.errors import GrantExpired, InvalidGrant
from kontextd_server.files.names import stated_name, stated_type
from kontextd_server.files.store import Label

MIN_SECRET_BYTES = 32
_PURPOSE = b"kontextd upload grant 1\n"  # a signature made with the same secret for anything else is no grant
_MAX_GRANT = 4096  # characters


@dataclass(frozen=True)
class Grant:
    """Leave to write the file `key`; with an `upload_id` in parts. `expires_at` in seconds since the epoch."""

    key: str
    label: Label
    expires_at: float
    upload_id: str | None = None


class GrantSigner:
    """Issues grants with the first secret and accepts those of all, so that a secret can be replaced in operation."""

    def __init__(self, secrets: Sequence[bytes], clock: Callable[[], float] = time.time) -> None:
        if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
            raise ValueError(f"each secret that signs grants needs at least {MIN_SECRET_BYTES} random bytes.")
        self.secrets = tuple(secrets)
        self.clock = clock

    def issue(self, grant: Grant) -> str:
        label = grant.label
        row = [
            grant.key,
            stated_name(label.file_name),
            stated_type(label.content_type),
            None if label.lifetime_s is None else str(label.lifetime_s),  # infinity is no JSON
            float(grant.expires_at),
            grant.upload_id,
            label.owner,
        ]
        payload = _encoded(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return f"{payload}.{_encoded(_mac(self.secrets[0], payload))}"

    def check(self, token: str) -> Grant:
        """The grant of a token. Raises `InvalidGrant` and `GrantExpired`."""
        payload, _, signature = token.partition(".")
        if len(token) > _MAX_GRANT or not self._is_ours(payload, signature):
            raise InvalidGrant("the upload address is not one that this server gave out. Ask for a new one.")
        grant = _parsed(payload)
        if grant.expires_at <= self.clock():
            raise GrantExpired("the upload address has expired. Ask for a new one.")
        return grant

    def _is_ours(self, payload: str, signature: str) -> bool:
        given = signature.encode("utf-8", "replace")
        return any(
            [hmac.compare_digest(_encoded(_mac(secret, payload)).encode("ascii"), given) for secret in self.secrets]
        )


def _mac(secret: bytes, payload: str) -> bytes:
    return hmac.digest(secret, _PURPOSE + payload.encode("utf-8", "replace"), hashlib.sha256)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _parsed(payload: str) -> Grant:
    """What a payload says whose signature was found to be ours."""
    try:
        match json.loads(_decoded(payload).decode("utf-8", "surrogatepass")):
            case [
                str(key),
                str(name),
                str(kind),
                str() | None as lifetime,
                float(end),
                str() | None as part,
                str() | None as owner,
            ]:
                label = Label(name, kind, None if lifetime is None else float(lifetime), owner)
                return Grant(key, label, end, part)
    except (ValueError, binascii.Error) as error:
        raise InvalidGrant("the upload address was given out by another version. Ask for a new one.") from error
    raise InvalidGrant("the upload address was given out by another version. Ask for a new one.")
