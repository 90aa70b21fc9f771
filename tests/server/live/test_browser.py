"""In Chromium: a page on another origin, without a key, through the key that the operator lends to its origin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fal_clients
import pytest
from kontextd_server.store import Store

from .box import LiveBox
from .expected import check_lines, check_output
from .studio import Studio

CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PAGE = b'<!doctype html><title>a studio</title><script src="/page.js"></script>'
LISTED, NOT_LENT_TO, UNLISTED = "localhost", "guest.localhost", "127.0.0.1"

Visit = dict[str, Any]


@pytest.fixture(scope="module")
def visits(box: LiveBox, studio: Studio, js: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Visit]:
    """What the same page was told at each of its origins."""
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if chromium is None:
        fal_clients.absent(f"none of {', '.join(CHROMIUMS)} is installed: apt-get install chromium-headless-shell")
    bundle = bundled(tmp_path_factory.mktemp("page") / "page.js")
    assert box.keys.lent.encode() not in bundle
    studio.publish("/", PAGE, "text/html")
    studio.publish("/page.js", bundle, "text/javascript")
    runs = {LISTED: "journey", NOT_LENT_TO: "refused", UNLISTED: "refused"}
    asked = [{"page": studio.page(host), "run": f"{run}({json.dumps(box.url)})"} for host, run in runs.items()]
    profile = tmp_path_factory.mktemp("profile")
    told = fal_clients.run_js("browser.cjs", chromium, str(profile), json.dumps(asked), timeout_s=300)
    return dict(zip(runs, told["visits"], strict=True))


def bundled(target: Path) -> bytes:
    told = fal_clients.run_js("bundle.cjs", str(fal_clients.JS / "browser_page.js"), str(target), timeout_s=120)
    assert told["errors"] == []
    return target.read_bytes()


def test_a_page_without_a_key_uploads_subscribes_and_streams(visits: dict[str, Visit], box: LiveBox) -> None:
    told, files = visits[LISTED]["told"], f"{box.url}/files/"
    assert told["uploaded"].startswith(files)
    assert told["same"]
    check_output(told["subscribed"]["data"], files)
    if told["subscribed"]["lines"]:  # an edit may be over between two polls
        check_lines(told["subscribed"]["lines"])
    check_output(told["streamed"]["result"], files)
    assert told["streamed"]["events"] > 1
    check_output(told["deprecated"], files)
    with box.store() as store:
        assert owner_of(store, told["subscribed"]["requestId"]) == "pages"


def owner_of(store: Store, request_id: str) -> str:
    job = store.views.status(request_id)
    assert job
    return job.owner


def test_a_page_reads_what_an_error_says(visits: dict[str, Visit]) -> None:
    invalid = visits[LISTED]["told"]["invalid"]
    assert (invalid["name"], invalid["status"]) == ("ValidationError", 422)
    assert invalid["requestId"]


def test_the_page_sends_no_key_and_asks_nobody_but_its_own_server_and_the_box(
    visits: dict[str, Visit], box: LiveBox, studio: Studio
) -> None:
    requests = visits[LISTED]["requests"]
    origins = {urlsplit(request["url"]).netloc for request in requests}
    assert origins == {urlsplit(box.url).netloc, urlsplit(studio.page(LISTED)).netloc}
    assert [request for request in requests if "authorization" in map(str.lower, request["headers"])] == []
    assert {request["method"] for request in requests} >= {"GET", "POST", "PUT"}


def test_an_origin_that_no_key_is_lent_to_is_told_so(visits: dict[str, Visit]) -> None:
    refused = visits[NOT_LENT_TO]["told"]
    assert (refused["is"], refused["status"]) == (["ApiError"], 401)


def test_an_unlisted_origin_is_refused(visits: dict[str, Visit], box: LiveBox) -> None:
    """The browser itself keeps the call from being made: nothing says that this origin may."""
    refused = visits[UNLISTED]["told"]
    assert "resolved" not in refused
    assert (refused["is"], refused.get("status")) == ([], None)
    assert refused["message"] == "Failed to fetch"
