"""Calls with `sync_mode`, and the search for what they left. Knows bytes and folders; knows no store."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fal_clients
import httpx

from .box import ENDPOINT, LiveBox, eventually
from .expected import edit_of
from .studio import PHOTO_SIDE, Studio, picture

_SLICE, _SLICES = 48, 12  # bytes that no other file has, and how many such pieces are looked for
_OWN_SEED = 99  # of a picture that no other test sends: what is found is of these calls


@dataclass(frozen=True)
class Inline:
    """What the calls were told, and everything that is to be forgotten: pictures as data URIs."""

    told: dict[str, Any]
    ran: dict[str, Any]
    webhook: dict[str, Any]
    found_at_first: Sequence[str]

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        return {
            "run": self.ran,
            "subscribe": self.told["subscribed"]["data"],
            "queue": self.told["queued"]["data"],
            "webhook": self.webhook["payload"],
            "stream": self.told["streamed"]["result"],
        }


def call_inline(box: LiveBox, studio: Studio) -> Inline:
    """Run, subscribe, stream and queue with a webhook; and a first look while results are still to be had."""
    asked = edit_of(studio, sync_mode=True, image_url=own_input())
    headers = {"Authorization": f"Key {box.keys.own}"}
    ran = httpx.post(f"{box.url}/{ENDPOINT}", json=asked, headers=headers, timeout=300, trust_env=False)
    config = {"credentials": box.keys.own, "proxyUrl": {"url": box.proxy_url, "when": "always"}}
    words = {"config": config, "input": asked, "webhookUrl": studio.receiver}
    told = fal_clients.run_js("fal_page.cjs", json.dumps(words), timeout_s=300)
    output = told["queued"]["data"]
    found = traces(box.data, [output["images"][0]["url"]])
    request_id = told["queued"]["request_id"]
    eventually(lambda: [one for one in studio.webhooks if one.told["request_id"] == request_id])
    (webhook,) = [one.told for one in studio.webhooks if one.told["request_id"] == request_id]
    return Inline(told, ran.json(), webhook, found)


def own_input() -> str:
    """Short enough to be an argument of a command."""
    return f"data:image/jpeg;base64,{base64.b64encode(picture(PHOTO_SIDE, _OWN_SEED, 'JPEG')).decode()}"


def secrets_of(inline: Inline) -> list[str]:
    """Every data URI that came, with the previews, and the one that was sent."""
    previews = [event["images"][0]["url"] for event in inline.told["streamed"]["events"]]
    return [own_input(), *previews, *(output["images"][0]["url"] for output in inline.outputs.values())]


def traces(folder: Path, uris: Sequence[str]) -> list[str]:
    """The files of a folder in which a piece of these pictures lies, as base64 or as bytes."""
    pieces = list(dict.fromkeys(piece for uri in uris for piece in _pieces(uri)))
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path.relative_to(folder)) for path in files if _holds(path, pieces)]


def _pieces(uri: str) -> Iterator[bytes]:
    """From all over: a database keeps a body in pages, with something else between two of them."""
    text = uri.partition(",")[2].encode()
    for data in (text, base64.b64decode(text)):
        chosen = random.Random(len(data))
        for _ in range(_SLICES):
            # Beyond headers and tables, which many pictures share.
            start = chosen.randrange(len(data) // 4, len(data) - _SLICE)
            yield data[start : start + _SLICE]


def _holds(path: Path, pieces: Sequence[bytes]) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # the box lives on
        return False
    return any(piece in content for piece in pieces)
