"""Through @fal-ai/server-proxy in front, which itself goes to fal's names: in Hono, and as far as it can in Express."""

from __future__ import annotations

import json
from pathlib import Path

import fal_clients
import pytest

from .conftest import Named
from .expected import check_lines, check_output, check_stream, edit_of
from .javascript import LARGE, Told
from .studio import Studio

FILES = "https://v3.fal.media/files/"


@pytest.fixture(scope="module")
def told(named: Named, studio: Studio, js: Path, photo_file: Path) -> Told:
    asked = {"input": edit_of(studio), "photo": str(photo_file), "bytes": LARGE}
    return fal_clients.run_js(
        "behind_proxy.cjs",
        json.dumps(asked),
        environment=named.environment,
        inside=named.inside(),
        timeout_s=300,
    )


def test_hono_passes_every_call_on(told: Told) -> None:
    hono = told["hono"]
    check_output(hono["subscribed"]["data"], FILES)
    if hono["subscribed"]["lines"]:  # an edit may be over between two polls
        check_lines(hono["subscribed"]["lines"])
    check_stream(hono["streamed"]["events"], FILES)
    assert hono["streamed"]["result"] == hono["streamed"]["events"][-1]
    check_output(hono["edited"]["data"], FILES)


def test_hono_passes_uploads_on_and_their_bytes_go_straight_to_us(told: Told) -> None:
    for name in ("uploaded", "large"):
        assert told["hono"][name]["url"].startswith(FILES)
        assert told["hono"][name]["same"], name


def test_hono_keeps_what_an_error_says(told: Told) -> None:
    invalid, unknown = told["hono"]["invalid"], told["hono"]["unknown"]
    assert (invalid["name"], invalid["status"]) == ("ValidationError", 422)
    assert invalid["fields"] == [{"at": "body.image_url", "type": "missing"}]
    assert (unknown["name"], unknown["status"]) == ("ApiError", 404)


def test_express_passes_subscribe_and_small_uploads_on(told: Told) -> None:
    express = told["express"]
    check_output(express["subscribed"]["data"], FILES)
    assert express["uploaded"]["url"].startswith(FILES)
    assert express["uploaded"]["same"]
