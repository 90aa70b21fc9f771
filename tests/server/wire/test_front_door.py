"""The wire layer as a whole: what stands in front of the routes, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kontextd_server.wire
import pytest
from kontextd_server.wire.endpoints import Endpoint
from kontextd_server.wire.front_door import DoorSettings, front_door
from kontextd_server.wire.virtual_hosts import context_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "onnxruntime", "PIL", "numpy"}


async def echo(request: Request) -> JSONResponse:
    call = context_of(request).call
    return JSONResponse([request.url.path, call.endpoint.id if call and call.endpoint else None])


def door(**settings: str) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    table = (Endpoint("fal-ai", "flux-kontext", "dev"),)
    return TestClient(front_door(app, DoorSettings(**settings), table))  # type: ignore[arg-type]


def test_the_endpoints_are_those_of_the_table() -> None:
    assert door().post("https://fal.run/fal-ai/flux-kontext/dev").json() == [
        "/fal-ai/flux-kontext/dev",
        "fal-ai/flux-kontext/dev",
    ]
    assert door().post("https://fal.run/fal-ai/flux-kontext-lora").status_code == 404


def test_the_proxy_can_be_elsewhere() -> None:
    headers = {"x-fal-target-url": "https://queue.fal.run/fal-ai/flux-kontext/dev"}
    told = door(proxy_path="/api/ours").post("http://box/api/ours", headers=headers).json()
    assert told[0] == "/queue/fal-ai/flux-kontext/dev"


@pytest.mark.parametrize("path", ["/health", "/acme/foo", "/api/fal/proxy"])
def test_every_answer_has_an_id(path: str) -> None:
    assert len(door().get(f"http://box{path}").headers["x-fal-request-id"]) == 36


def test_importing_the_wire_imports_no_engine() -> None:
    names = [path.stem for path in Path(kontextd_server.wire.__path__[0]).glob("[a-z]*.py")]
    imports = ", ".join(f"kontextd_server.wire.{name}" for name in sorted(names))
    code = f"import sys, {imports}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
