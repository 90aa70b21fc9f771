"""Where tests get the official fal clients from: npm's beside the virtual environment, Python's from the dev extra."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

JS = Path(__file__).parent / "clients" / "js"


def absent(what: str) -> NoReturn:
    """Skips a test that this machine cannot run. In continuous integration it has to run, so there it fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def js_modules() -> Path:
    """The node_modules with the versions that `clients/js` pins, installed once a version and environment."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        absent("node and npm are not installed, so the JavaScript clients cannot run")
    pins = [JS / "package.json", JS / "package-lock.json"]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in pins)).hexdigest()[:12]
    cache = Path(sys.prefix) / "clients" / f"js-{version}"
    if not cache.exists():
        cache.parent.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=cache.parent))
        for path in pins:
            shutil.copy(path, draft)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=draft, check=True, timeout=300)
        try:
            draft.rename(cache)
        except OSError:  # another run was faster
            shutil.rmtree(draft)
    return cache / "node_modules"


def run_js(
    script: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    inside: Sequence[str] = (),
    timeout_s: float = 180,
) -> dict[str, Any]:
    """What a script of `clients/js` prints as its last line: one JSON object. `inside` goes before the command."""
    variables = {"NODE_PATH": str(js_modules()), **(environment or {})}
    return _told([*inside, "node", str(JS / script), *arguments], variables, timeout_s)


def run_python(
    code: str, environment: Mapping[str, str], *arguments: str, inside: Sequence[str] = (), timeout_s: float = 180
) -> dict[str, Any]:
    """What a program prints as its last line. A process of its own: the client reads its hosts when it is imported."""
    return _told([*inside, sys.executable, "-c", code, *arguments], environment, timeout_s)


def _told(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    variables = {"PATH": os.environ["PATH"], **environment}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))
