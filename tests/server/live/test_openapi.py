"""Schemathesis makes requests from the box's own OpenAPI document, right and wrong ones: none is answered by a 5xx."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from .box import LiveBox, environment_of

CHECKS = "not_a_server_error,status_code_conformance"


def test_no_request_of_the_document_is_answered_by_a_server_error(box: LiveBox, tmp_path: Path) -> None:
    fuzz(box, tmp_path, "--max-examples", "3", "--generation-deterministic")


@pytest.mark.long
def test_no_request_of_a_long_search_is_answered_by_a_server_error(box: LiveBox, tmp_path: Path) -> None:
    fuzz(box, tmp_path, "--max-examples", "300")


def fuzz(box: LiveBox, folder: Path, *options: str) -> None:
    before = len(box.log.read_text())
    command = (sys.executable, "-m", "schemathesis.cli", "run", f"{box.url}/openapi.json", "--no-color")
    key = ("--header", f"Authorization: Key {box.keys.own}", "--checks", CHECKS)
    whole, clean = (*command, *key, *options), environment_of({})
    ran = subprocess.run(whole, cwd=folder, env=clean, capture_output=True, text=True, timeout=3600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    document = httpx.get(f"{box.url}/openapi.json", trust_env=False).json()
    operations = sum(len(methods) for methods in document["paths"].values())
    tested = re.search(r"Tested: (\d+)", ran.stdout)
    assert tested, ran.stdout
    assert int(tested[1]) == operations > 20
    said = box.log.read_text()[before:]
    assert [line for line in said.splitlines() if " ERROR " in line or "Traceback" in line] == []
