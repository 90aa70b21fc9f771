"""Where tests get the official fal clients from: npm's beside the virtual environment, Python's from the dev extra."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

JS = Path(__file__).parent / "clients" / "js"


def js_modules() -> Path:
    """The node_modules with the versions that `clients/js` pins, installed once a version and environment."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed, so the JavaScript clients cannot run")
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


def run_js(script: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What a script of `clients/js` prints as its last line: one JSON object."""
    variables = {"PATH": os.environ["PATH"], "NODE_PATH": str(js_modules()), **(environment or {})}
    command = ["node", str(JS / script), *arguments]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


def run_python(code: str, environment: dict[str, str]) -> dict[str, Any]:
    """What a program prints as its last line. A process of its own: the client reads its hosts when it is imported."""
    variables = {"PATH": os.environ["PATH"], **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))
