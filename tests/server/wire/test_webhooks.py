"""Webhooks, verified by Ed25519 as RFC 8032 spells it out, in integers, with nothing of the signing library."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from kontextd_server.wire.error_table import answer
from kontextd_server.wire.errors import RunnerDisconnected
from kontextd_server.wire.webhooks import RETRY_DELAYS_S, WebhookKey, failure_body, jwks, success_body

# RFC 8032, section 5.1: the curve -x² + y² = 1 + d·x²·y² over the field of p elements, with a base point of order L.
P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def times(factor: int, point: Point) -> Point:
    result = (0, 1)
    while factor:
        if factor & 1:
            result = add(result, point)
        point, factor = add(point, point), factor >> 1
    return result


def decoded(data: bytes) -> Point:
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square, "not a point of the curve"
    return (x if x & 1 == sign else P - x), y


def is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    base = decoded((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    s = int.from_bytes(signature[32:], "little")
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    return s < L and times(s, base) == add(decoded(signature[:32]), times(h, decoded(public)))


def test_the_verification_here_passes_the_rfcs_own_example() -> None:
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert is_signed(public, b"\x72", signature)
    assert not is_signed(public, b"\x73", signature)


@pytest.fixture
def key(tmp_path: Path) -> WebhookKey:
    return WebhookKey.from_file(tmp_path / "webhook-key.pem")


def test_a_delivery_is_signed_so_that_a_receiver_can_check_it_with_the_document(key: WebhookKey) -> None:
    body = success_body("r1", {"images": [], "prompt": "█"})
    headers = key.headers("r1", "studio", 1_700_000_000, body)
    (jwk,) = json.loads(json.dumps(jwks(key)))["keys"]
    assert (jwk["kty"], jwk["crv"], jwk["alg"], jwk["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
    public = base64.urlsafe_b64decode(jwk["x"] + "=")
    names = ("Request-Id", "User-Id", "Timestamp")
    message = "\n".join([*(headers[f"X-Fal-Webhook-{name}"] for name in names), hashlib.sha256(body).hexdigest()])
    signature = bytes.fromhex(headers["X-Fal-Webhook-Signature"])
    assert is_signed(public, message.encode(), signature)
    assert not is_signed(public, message.encode() + b"x", signature)


def test_the_body_of_a_success() -> None:
    assert json.loads(success_body("r1", {"seed": 7})) == {
        "request_id": "r1",
        "gateway_request_id": "r1",
        "status": "OK",
        "payload": {"seed": 7},
    }


@pytest.mark.parametrize("output", [{"seconds": float("nan")}, {"image": b"bytes"}])
def test_a_result_that_is_no_json_is_told_as_such(output: dict[str, object]) -> None:
    told = json.loads(success_body("r1", output))
    assert (told["status"], told["payload"]) == ("OK", None)
    assert "not valid JSON" in told["payload_error"]


def test_the_body_of_a_failure_holds_what_the_result_would_answer() -> None:
    failure = answer(RunnerDisconnected("the worker died"))
    told = json.loads(failure_body("r1", failure))
    assert (told["status"], told["error"], told["payload"]) == ("ERROR", "the worker died", failure.body)


def test_ten_more_tries_are_made_within_two_hours() -> None:
    assert len(RETRY_DELAYS_S) == 10
    assert sum(RETRY_DELAYS_S) == 7200
    assert sorted(RETRY_DELAYS_S) == list(RETRY_DELAYS_S)


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "webhook-key.pem"
    first = WebhookKey.from_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert WebhookKey.from_file(path).jwk() == first.jwk()
    assert WebhookKey.from_file(tmp_path / "other.pem").jwk()["kid"] != first.jwk()["kid"]


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    other = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ValueError, match="no Ed25519 key"):
        WebhookKey.from_file(path)
