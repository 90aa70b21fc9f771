"""Webhooks as bytes and headers: bodies, signatures, the key document. Knows fal's format; sends nothing.

The signature is Ed25519, in hex, over four lines: request id, user id, timestamp, SHA-256 of the body in hex.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from kontextd_server.wire.error_table import ErrorAnswer
from kontextd_server.wire.key_files import load_or_create

TIMEOUT_S = 15.0
# Ten more tries within two hours after the first, as fal's documentation has it.
RETRY_DELAYS_S = (5.0, 15.0, 40.0, 120.0, 300.0, 600.0, 900.0, 1320.0, 1800.0, 2100.0)


@dataclass(frozen=True)
class WebhookKey:
    """The key that signs webhooks."""

    private: Ed25519PrivateKey

    @classmethod
    def from_file(cls, path: Path) -> WebhookKey:
        """The key of a PEM file, which is made where there is none. Raises `ValueError` for another kind of key."""
        private = load_pem_private_key(load_or_create(path, _new_pem), password=None)
        if not isinstance(private, Ed25519PrivateKey):
            raise ValueError(f"{path} holds no Ed25519 key. Move it away: a new one is made.")
        return cls(private)

    def headers(self, request_id: str, user_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
        """The headers of a delivery of exactly these bytes."""
        digest = hashlib.sha256(body).hexdigest()
        message = f"{request_id}\n{user_id}\n{timestamp_s}\n{digest}".encode()
        return {
            "Content-Type": "application/json",
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": user_id,
            "X-Fal-Webhook-Timestamp": str(timestamp_s),
            "X-Fal-Webhook-Signature": self.private.sign(message).hex(),
        }

    def jwk(self) -> dict[str, str]:
        """The public half as RFC 8037 has it; `kid` is its RFC 7638 thumbprint."""
        raw = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        required = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw)}
        thumbprint = hashlib.sha256(json.dumps(required, separators=(",", ":"), sort_keys=True).encode()).digest()
        return {**required, "kid": _base64url(thumbprint), "use": "sig", "alg": "EdDSA"}


def jwks(*keys: WebhookKey) -> dict[str, list[dict[str, str]]]:
    """The document at /.well-known/jwks.json. After a change of keys the former one is listed as well for a day."""
    return {"keys": [key.jwk() for key in keys]}


def success_body(request_id: str, output: Mapping[str, object]) -> bytes:
    """The body for a request that succeeded. An output that is no JSON is told as `payload_error`."""
    told = {"request_id": request_id, "gateway_request_id": request_id, "status": "OK"}
    try:
        return _json({**told, "payload": output})
    except (TypeError, ValueError) as error:
        return _json({**told, "payload": None, "payload_error": f"the result is not valid JSON: {error}"})


def failure_body(request_id: str, failure: ErrorAnswer) -> bytes:
    """The body for a request that failed; the payload is what its result would answer."""
    return _json(
        {
            "request_id": request_id,
            "gateway_request_id": request_id,
            "status": "ERROR",
            "error": failure.message,
            "payload": failure.body,
        }
    )


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _new_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
