"""Every call that fal-client has for this endpoint, as a program that prints what each gave as one line of JSON.

Usage: python every_call.py '{"async": bool, "input": {…}, "endless": {…}, "uploads": FOLDER or null}'; "endless" is an
input that takes minutes. The client's blocking and its asynchronous face take the same words, so both go through one
journey here.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import sys
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from pathlib import Path
from typing import Any

import fal_client
import httpx
from PIL import Image

ENDPOINT = "fal-ai/flux-kontext-lora"
asked = json.loads(sys.argv[1])
EDIT, ENDLESS = asked["input"], asked["endless"]


async def call(name: str, *arguments: Any, **words: Any) -> Any:
    return await settled(getattr(fal_client, f"{name}_async" if asked["async"] else name)(*arguments, **words))


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def listed(many: Any) -> list[Any]:
    return [one async for one in many] if isinstance(many, AsyncIterable) else list(many)


def streamed(arguments: dict[str, Any]) -> Any:
    return (fal_client.stream_async if asked["async"] else fal_client.stream)(ENDPOINT, arguments)


async def failure(of: Callable[[], Awaitable[object]]) -> dict[str, Any] | None:
    try:
        await of()
    except fal_client.FalClientHTTPError as error:
        return {"status": error.status_code, "type": error.error_type}
    return None


async def ran() -> dict[str, Any]:
    return {"output": await call("run", ENDPOINT, EDIT), "streamed": await listed(streamed(EDIT))}


async def subscribed() -> dict[str, Any]:
    lines: list[str] = []
    enqueued: list[str] = []

    def update(status: fal_client.Status) -> None:
        if isinstance(status, fal_client.InProgress | fal_client.Completed):
            lines[:] = [log["message"] for log in status.logs or []]

    words: dict[str, Any] = {"with_logs": True, "on_queue_update": update, "on_enqueue": enqueued.append}
    output = await call("subscribe", ENDPOINT, EDIT, **words, client_timeout=300)
    return {"output": output, "lines": lines, "enqueued": enqueued}


async def queued() -> dict[str, Any]:
    handle = await call("submit", ENDPOINT, EDIT, priority="low", start_timeout=300, hint="tests")
    events = await listed(handle.iter_events(with_logs=True))
    got = await settled(handle.get())
    status = await call("status", ENDPOINT, handle.request_id, with_logs=True)
    return {
        "request_id": handle.request_id,
        "urls": [handle.response_url, handle.status_url, handle.cancel_url],
        "events": [type(event).__name__ for event in events],
        "got": got,
        "result": await call("result", ENDPOINT, handle.request_id),
        "status": type(status).__name__,
        "lines": len(status.logs),
    }


async def interrupted() -> dict[str, Any]:
    """A request that keeps the worker busy, one that cannot start in time behind it, and the end of the first."""
    busy = await call("submit", ENDPOINT, ENDLESS)
    while not isinstance(await settled(busy.status()), fal_client.InProgress):
        time.sleep(0.1)
    late = await failure(lambda: call("run", ENDPOINT, EDIT, start_timeout=1.1))
    await call("cancel", ENDPOINT, busy.request_id)
    await listed(busy.iter_events())
    ended = await settled(busy.status())
    return {"late": late, "ended": ended.error_type, "result": await failure(lambda: settled(busy.get()))}


async def refused() -> dict[str, Any]:
    nobody = "00000000-0000-0000-0000-000000000000"
    return {
        "invalid": await failure(lambda: call("run", ENDPOINT, {"prompt": "no picture"})),
        "unknown": await failure(lambda: call("result", ENDPOINT, nobody)),
        "broken_stream": await broken_off({"prompt": "no picture"}),
    }


async def broken_off(arguments: dict[str, Any]) -> str | None:
    try:
        await listed(streamed(arguments))
    except Exception as error:  # the client's own stream raises what its SSE reader does
        return type(error).__name__
    return None


async def uploaded(folder: Path) -> dict[str, Any]:
    """Whole, in parts, and as a picture, which is then edited."""
    picture = await call("upload_image", Image.open(folder / "photo.png"), "png")
    big = await call("upload_file", folder / "big.bin")
    text = await call("upload", "Hello, World!", "text/plain", "hello.txt")
    lasting = fal_client.StorageSettings(expires_in="1h")
    fallen_back = await call("upload", b"by the other way", "text/plain", repository="fal", lifecycle=lasting)
    read = httpx.get(text)
    return {
        "urls": [picture, big, text, fallen_back],
        "edited": await call("run", ENDPOINT, {**EDIT, "image_url": picture}),
        "big": _sha256(big),
        "text": [read.text, read.headers["content-type"]],
        "fallen_back": httpx.get(fallen_back).text,
    }


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with httpx.stream("GET", url, timeout=300) as read:
        for chunk in read.iter_bytes():
            digest.update(chunk)
    return digest.hexdigest()


async def journey() -> dict[str, Any]:
    told = {
        "ran": await ran(),
        "subscribed": await subscribed(),
        "queued": await queued(),
        "interrupted": await interrupted(),
        "refused": await refused(),
    }
    if asked["uploads"]:
        told["uploaded"] = await uploaded(Path(asked["uploads"]))
    return told


if __name__ == "__main__":
    print(json.dumps(asyncio.run(journey())))
