"""What the JavaScript client can do besides, by one line of configuration; and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import fal_clients
import pytest

from .box import LiveBox
from .expected import edit_of, endless
from .javascript import LARGE, Told, check_every_call
from .studio import Studio


@pytest.fixture(scope="module")
def told(box: LiveBox, studio: Studio, js: Path, photo_file: Path) -> Told:
    config = {"credentials": box.keys.own, "proxyUrl": {"url": box.proxy_url, "when": "always"}}
    inputs = {"input": edit_of(studio), "endless": endless(studio), "photo": str(photo_file)}
    return fal_clients.run_js("every_call.cjs", json.dumps({"config": config, "bytes": LARGE, **inputs}), timeout_s=300)


def test_every_other_call_of_the_client(told: Told, box: LiveBox) -> None:
    check_every_call(told, box, f"{box.url}/files/")
