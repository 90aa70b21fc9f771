"""The library of LoRAs as callers may see it: names to send, and what they stand for. Knows no folders, no jobs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from kontextd_server.api.documented import KEYED
from kontextd_server.api.parts import Api
from kontextd_server.lora_library import KeptLora
from kontextd_server.wire.answers import LibraryLora, LoraListing
from kontextd_server.wire.statuses import iso_time

PATH = "/kontextd/loras"


class LoraRoutes:
    """The handler of our own listing, which fal does not have."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def router(self) -> APIRouter:
        router = APIRouter(tags=["loras"])
        router.get(PATH, responses=KEYED)(self.loras)
        return router

    async def loras(self, request: Request) -> LoraListing:
        """What is in the library of the box that answers, and the names of its roots."""
        await self._api.gate.caller(request)
        kept = await self._api.off_loop.file(self._api.parts.library.files)
        return LoraListing(loras=[_told(one) for one in kept], roots=list(self._api.parts.lora_roots))


def _told(kept: KeptLora) -> LibraryLora:
    return LibraryLora(
        path=kept.path,
        sha256=kept.sha256,
        size_bytes=kept.size_bytes,
        dialects=list(kept.dialects),
        rank=kept.rank,
        trigger_words=list(kept.trigger_words),
        matched=kept.matched,
        total=kept.total,
        added_at=iso_time(kept.added_at),
    )
