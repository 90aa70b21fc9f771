"""A studio's own web server: pictures, a page, a receiver of webhooks. Knows bytes; knows no client."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from loopback import Asked, Exchange, Origin
from PIL import Image

PHOTO_SIDE, LARGE_SIDE = 256, 512


@dataclass(frozen=True)
class Delivered:
    """A webhook as it came."""

    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Studio:
    """`photo` takes about a second to edit, `large` and fifty steps take long enough to be interrupted."""

    origin: Origin
    webhooks: list[Delivered] = field(default_factory=list)

    @property
    def photo(self) -> str:
        return self.origin.url("/photo.png")

    @property
    def large(self) -> str:
        return self.origin.url("/large.png")

    @property
    def receiver(self) -> str:
        return self.origin.url("/webhooks?studio=1")

    def page(self, host: str) -> str:
        """The page by one of this machine's names: each is an origin of its own."""
        return self.origin.url("/", host)

    def asked(self, path: str) -> list[Asked]:
        return [asked for asked in self.origin.asked if asked.path == path]

    def publish(self, path: str, body: bytes, content_type: str) -> None:
        self.origin.routes[path] = lambda exchange: exchange.answer(body, Content_Type=content_type)

    def take_webhook(self, exchange: Exchange) -> None:
        headers = exchange.asked.headers
        body = exchange.handler.rfile.read(int(headers["content-length"]))
        self.webhooks.append(Delivered(headers, body))
        exchange.answer(b"thanks")


@contextmanager
def open_studio() -> Iterator[Studio]:
    origin = Origin()
    studio = Studio(origin)
    origin.routes["/webhooks"] = studio.take_webhook
    studio.publish("/photo.png", picture(PHOTO_SIDE), "image/png")
    studio.publish("/large.png", picture(LARGE_SIDE), "image/png")
    try:
        yield studio
    finally:
        origin.close()


def picture(side: int, seed: int = 5, encoding: str = "PNG") -> bytes:
    """A square picture: smooth colours and an edge, with grain that no other picture has."""
    y, x = np.mgrid[0:side, 0:side]
    channels = [np.sin(x / 9) * 90 + 128, np.cos(y / 7) * 90 + 128, (x + y) * 127 / side]
    pixels = np.stack(channels, axis=-1) + np.random.default_rng(seed).normal(0, 3, (side, side, 3))
    pixels[side // 3 : side // 2, side // 4 : side // 2] = (200, 30, 40)
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, encoding)
    return encoded.getvalue()
