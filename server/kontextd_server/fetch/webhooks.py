"""Webhooks by the same rules as downloads: checked when they are asked for and at each delivery. Knows no jobs."""

from __future__ import annotations

from collections.abc import Mapping

from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.network import Deadline
from kontextd_server.fetch.urls import parse
from kontextd_server.fetch.web import Web


def check_webhook(web: Web, url: str) -> None:
    """Refuse a webhook that could not be delivered by today's rules. Raises `FetchError`."""
    rules = web.config.rules(Purpose.WEBHOOK)
    web.check(parse(url), Purpose.WEBHOOK, Deadline(rules.connect_s))


def post(web: Web, url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """POST to a webhook and return the status; a redirect is not followed. Raises `FetchError`.

    The body of the answer is not read: nothing in it matters, and it might not end.
    """
    rules = web.config.rules(Purpose.WEBHOOK)
    with web.request("POST", parse(url), Purpose.WEBHOOK, Deadline(rules.total_s), headers, body) as answer:
        return answer.status
