"""Our own pages: is it alive, can it work, how much, and by which keys it signs. Knows the store's counts; no jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kontextd_server.api.metrics import Metrics
from kontextd_server.api.parts import Api
from kontextd_server.store import StoreUnavailable, Worker, WorkerState
from kontextd_server.wire.errors import NotAccepted
from kontextd_server.wire.openapi import document
from kontextd_server.wire.webhooks import jwks

_ABLE = frozenset({WorkerState.READY, WorkerState.BUSY})


class HealthRoutes:
    """Handlers of what fal does not have, and of the webhook keys."""

    def __init__(self, api: Api, metrics: Metrics) -> None:
        self._api, self._metrics = api, metrics

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"])
        router.get("/health")(self.health)
        router.get("/ready")(self.ready)
        router.get("/metrics", response_class=Response)(self.metrics)
        router.get("/.well-known/jwks.json")(self.jwks)
        router.get("/rest/.well-known/jwks.json", include_in_schema=False)(self.jwks)
        router.get("/openapi.json", include_in_schema=False)(self.openapi)
        return router

    async def health(self, request: Request) -> Response:
        """Live: 200 as long as the process answers, whatever else is wrong."""
        told: dict[str, object] = {"status": "draining" if self._api.drain.has_begun else "ok"}
        told |= {"version": self._api.config.version, "endpoints": [one.id for one in self._api.config.table]}
        try:
            workers = await self._api.off_loop.read(self._api.store.workers.live)
            told |= {"store": "ok", "workers": [_worker(worker) for worker in workers]}
        except StoreUnavailable:
            told |= {"store": "unavailable", "workers": []}
        told["wakeups"] = "ok" if self._api.parts.watcher.connected else "polling"
        return JSONResponse(told)

    async def ready(self, request: Request) -> Response:
        """200 when a worker can take a job."""
        self._api.drain.check_open()
        workers = await self._api.off_loop.read(self._api.store.workers.live)
        able = sum(worker.state in _ABLE for worker in workers)
        if not able:
            told = ", ".join(sorted(worker.state for worker in workers)) or "none"
            raise NotAccepted(f"no worker has its model loaded yet (workers: {told}). Requests are queued until then.")
        return JSONResponse({"status": "ready", "workers": able})

    async def metrics(self, request: Request) -> Response:
        text = await self._api.off_loop.read(self._metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def jwks(self, request: Request) -> Response:
        return JSONResponse(jwks(*self._api.parts.webhook_keys), headers={"Cache-Control": "public, max-age=3600"})

    async def openapi(self, request: Request) -> Response:
        app: Any = request.app  # Any: Starlette does not know which application is its own
        assert isinstance(app, FastAPI)
        return JSONResponse(document(app))


def _worker(worker: Worker) -> dict[str, object]:
    """What may be said to anybody: no host names, no process ids."""
    return {"id": worker.id, "state": worker.state, "device": worker.device, "version": worker.model_version}
