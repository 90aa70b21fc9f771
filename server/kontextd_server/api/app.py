"""The API as one ASGI application: fal's contract over the stores. Never imports torch; answers while a GPU is busy.

    CallLog ▶ the front door of `wire` ▶ WholeMethods ▶ RouteNames ▶ ShortPath ▶ FastAPI

Everything that is done to a job goes through the store, where workers find it: there is no other protocol.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from kontextd_server.api.config import ApiConfig
from kontextd_server.api.file_routes import FileRoutes
from kontextd_server.api.health import HealthRoutes
from kontextd_server.api.logs import CallLog, RouteNames
from kontextd_server.api.lora_routes import LoraRoutes
from kontextd_server.api.methods import WholeMethods
from kontextd_server.api.metrics import Metrics
from kontextd_server.api.parts import Api, ApiParts
from kontextd_server.api.queue_routes import QueueRoutes
from kontextd_server.api.run_routes import RunRoutes
from kontextd_server.api.short_path import ShortPath
from kontextd_server.api.storage_routes import StorageRoutes
from kontextd_server.api.upload_routes import UploadRoutes
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.front_door import front_door

_ABOUT = "FLUX.1 Kontext image editing by fal's contract, self-hosted."


def create_app(config: ApiConfig, parts: ApiParts, *, short: bool = True) -> ASGIApp:
    """The application as a server runs it. uvicorn needs `proxy_headers=False`, `ws="none"`; see `serve`.

    `short` False leaves out the short path, which changes no answer: to compare the two.
    """
    api, metrics = Api(config, parts), Metrics(parts.store)
    queue, run = QueueRoutes(api), RunRoutes(api)
    routed = _routes(api, queue, run, metrics)
    shortened = ShortPath(routed, {**queue.repeated, **run.repeated}) if short else routed
    whole = WholeMethods(RouteNames(shortened), routed.routes)
    return CallLog(front_door(whole, config.door, config.table), metrics.calls)


def _routes(api: Api, queue: QueueRoutes, run: RunRoutes, metrics: Metrics) -> FastAPI:
    app = FastAPI(
        title="kontextd",
        version=api.config.version,
        description=_ABOUT,
        openapi_url=None,  # ours has fal's schema names
        docs_url=None,  # these pages load scripts from the internet
        redoc_url=None,
        redirect_slashes=False,  # a client that posts does not follow
    )
    # Uploads before files: /files/upload is no key.
    for routes in (queue, run, StorageRoutes(api), UploadRoutes(api), FileRoutes(api), LoraRoutes(api)):
        app.router.routes += routes.router().routes  # an included router costs a second matching with each call
    app.router.routes += HealthRoutes(api, metrics).router().routes
    answer_errors(app)
    return app
