"""The calls of fal's page for this endpoint in JavaScript, as it shows them, with one line of configuration."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import fal_clients
import httpx
import pytest
from kontextd_server.store import WebhookReport, WebhookState
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from .box import LiveBox, eventually
from .expected import STEPS, check_lines, check_output, check_picture, check_stream, edit_of, picture_of
from .studio import Delivered, Studio

Told = dict[str, Any]


@pytest.fixture(scope="module")
def told(box: LiveBox, studio: Studio, js: Path) -> Told:
    config = {"credentials": box.keys.own, "proxyUrl": {"url": box.proxy_url, "when": "always"}}
    asked = {"config": config, "input": edit_of(studio), "webhookUrl": studio.receiver}
    return fal_clients.run_js("fal_page.cjs", json.dumps(asked), timeout_s=300)


def test_subscribe_tells_of_logs_and_gives_the_picture(told: Told, box: LiveBox) -> None:
    subscribed = told["subscribed"]
    check_output(subscribed["data"], f"{box.url}/files/")
    check_picture(picture_of(subscribed["data"]))
    with box.store() as store:
        assert [line.message for line in store.views.logs(subscribed["requestId"])]
    if subscribed["lines"]:  # an edit may be over between two polls
        check_lines(subscribed["lines"])


def test_a_stream_is_iterated_and_its_done_is_the_output(told: Told, box: LiveBox) -> None:
    check_stream(told["streamed"]["events"], f"{box.url}/files/")
    assert told["streamed"]["result"] == told["streamed"]["events"][-1]


def test_a_submitted_request_has_a_status_with_logs_and_a_result(told: Told, box: LiveBox) -> None:
    queued = told["queued"]
    assert queued["status"]["status"] == "COMPLETED"
    assert len(queued["status"]["logs"]) == STEPS
    check_lines([log["message"] for log in queued["status"]["logs"]])
    assert queued["requestId"] == queued["request_id"]
    check_output(queued["data"], f"{box.url}/files/")


def test_a_text_file_is_uploaded_and_read_back(told: Told, box: LiveBox) -> None:
    uploaded = told["uploaded"]
    assert uploaded["url"].startswith(f"{box.url}/files/")
    assert uploaded["text"] == "Hello, World!"
    assert uploaded["type"].startswith("text/plain")


def test_the_webhook_is_delivered_once_and_signed_by_the_key_of_the_jwks(
    told: Told, box: LiveBox, studio: Studio
) -> None:
    """Checked by libsodium, which has no code in common with what signed it."""
    request_id = told["queued"]["request_id"]

    def came() -> list[Delivered]:
        return [webhook for webhook in studio.webhooks if webhook.told["request_id"] == request_id]

    eventually(came)
    (webhook,) = came()
    assert (webhook.told["status"], webhook.told["payload"]) == ("OK", told["queued"]["data"])
    assert tries_of(box, request_id) == 1
    signature = bytes.fromhex(webhook.headers["x-fal-webhook-signature"])
    forged = Delivered(webhook.headers, webhook.body.replace(b'"OK"', b'"KO"'))
    for place in ("/.well-known/jwks.json", "/rest/.well-known/jwks.json"):
        (key,) = httpx.get(f"{box.url}{place}", trust_env=False).json()["keys"]
        assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")
        verify = VerifyKey(base64.urlsafe_b64decode(key["x"] + "=="))
        verify.verify(signed_text(webhook), signature)
        with pytest.raises(BadSignatureError):
            verify.verify(signed_text(forged), signature)


def tries_of(box: LiveBox, request_id: str) -> int:
    """Once it is recorded that it was delivered: there is no further one."""
    with box.store() as store:

        def delivered() -> WebhookReport | None:
            report = store.views.report(request_id)
            webhook = report.webhook if report else None
            return webhook if webhook and webhook.state is WebhookState.DELIVERED else None

        eventually(delivered)
        found = delivered()
    assert found
    return found.attempt


def signed_text(webhook: Delivered) -> bytes:
    """As fal's documentation puts it together."""
    fields = [webhook.headers[f"x-fal-webhook-{name}"] for name in ("request-id", "user-id", "timestamp")]
    return "\n".join([*fields, hashlib.sha256(webhook.body).hexdigest()]).encode()
