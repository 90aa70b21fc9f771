"""The deprecated @fal-ai/serverless-client in Node, led here by a requestMiddleware. In a page: test_browser.py."""

from __future__ import annotations

import json
from pathlib import Path

import fal_clients

from .box import LiveBox
from .expected import check_lines, check_output, check_stream, edit_of
from .studio import Studio


def test_the_deprecated_client_subscribes_streams_and_uploads(
    box: LiveBox, studio: Studio, js: Path, photo_file: Path
) -> None:
    asked = {"url": box.url, "key": box.keys.own, "input": edit_of(studio), "photo": str(photo_file)}
    told = fal_clients.run_js("serverless.cjs", json.dumps(asked), timeout_s=300)
    files = f"{box.url}/files/"
    check_output(told["subscribed"], files)
    if told["lines"]:  # an edit may be over between two polls
        check_lines(told["lines"])
    check_stream(told["streamed"]["events"], files)
    assert told["streamed"]["result"] == told["streamed"]["events"][-1]
    assert told["uploaded"].startswith(files)
    assert told["same"]
    check_output(told["transformed"], files)
    assert (told["invalid"]["name"], told["invalid"]["status"]) == ("ValidationError", 422)
    assert told["hosts"] == ["fal.run", "queue.fal.run", "rest.alpha.fal.ai"]
