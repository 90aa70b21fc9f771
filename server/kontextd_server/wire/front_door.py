"""All that stands in front of the routes, in its order. Knows the middlewares; knows no routes.

    RequestIds ▶ CORS ▶ FalProxy ▶ VirtualHosts ▶ the application

An id for every answer, preflights before anything else, a proxied call before its host is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from starlette.types import ASGIApp

from kontextd_server.wire.addresses import AddressSettings
from kontextd_server.wire.cors import CorsSettings, with_cors
from kontextd_server.wire.endpoints import ENDPOINTS, Endpoint
from kontextd_server.wire.proxy import PROXY_PATH, FalProxy, Lending
from kontextd_server.wire.request_ids import RequestIds
from kontextd_server.wire.virtual_hosts import VirtualHosts


@dataclass(frozen=True)
class DoorSettings:
    """`lending`: the origins that a key is lent to may call, without being named in `cors` again."""

    addresses: AddressSettings = field(default_factory=AddressSettings)
    cors: CorsSettings = field(default_factory=CorsSettings)
    lending: Lending | None = None
    proxy_path: str = PROXY_PATH


def front_door(app: ASGIApp, settings: DoorSettings, table: Sequence[Endpoint] = ENDPOINTS) -> ASGIApp:
    """The application as clients reach it."""
    routed = VirtualHosts(app, settings.addresses, table)
    proxied = FalProxy(routed, settings.addresses, settings.proxy_path, settings.lending)
    return RequestIds(with_cors(proxied, _cors(settings)))


def _cors(settings: DoorSettings) -> CorsSettings:
    lent_to = settings.lending.origins if settings.lending else ()
    return replace(settings.cors, origins=tuple(dict.fromkeys((*settings.cors.origins, *sorted(lent_to)))))
