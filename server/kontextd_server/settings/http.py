"""The settings of the API process: where it listens, how it is reached, whom it lets in, how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.settings.rows import MIB, checked, count, flag, names, path, port, positive, rate, seconds, setting
from kontextd_server.wire.errors import BadRequest
from kontextd_server.wire.hosts import HostNames, parse_host

if TYPE_CHECKING:  # what a server needs is imported where it is made: `kontextd --help` and `edit` start fast
    from kontextd_server.api.config import ApiConfig
    from kontextd_server.wire.addresses import AddressSettings

_HOSTS = HostNames()


def _public_url(text: str) -> str:
    from kontextd_server.wire.addresses import parse_origin

    return str(parse_origin(text))


def _proxies(parts: tuple[str, ...]) -> None:
    from kontextd_server.wire.addresses import AddressSettings

    try:
        AddressSettings(trusted_proxies=parts)
    except ValueError as error:
        raise ValueError(f"{error}; use addresses, networks such as 10.0.0.0/8, or unix") from error


def _origins(parts: tuple[str, ...]) -> None:
    from kontextd_server.wire.cors import CorsSettings

    CorsSettings(origins=parts)


def _hosts(text: str) -> tuple[str, ...]:
    """As a Host header is compared with them."""
    try:
        hosts = [parse_host(name) for name in names(text)]
    except BadRequest as error:
        raise ValueError(f"{error} Use host names such as fal.run") from error
    if not hosts or any(host.port is not None for host in hosts):
        raise ValueError("use one host name or more, such as fal.run, without a port")
    return tuple(host.name for host in hosts)


@dataclass(frozen=True)
class HttpSettings:
    host: str = setting("127.0.0.1", str, "address to listen at; 0.0.0.0 is every address of the box")
    port: int = setting(8000, port, "port to listen at")
    tls_cert: Path | None = setting(None, path, "certificate chain in PEM; with it the server speaks TLS")
    tls_key: Path | None = setting(None, path, "private key of the certificate, in PEM")
    public_url: str | None = setting(
        None, _public_url, "address in the URLs that are handed out; else the caller's own"
    )
    trusted_proxies: tuple[str, ...] = setting(
        (), checked(names, _proxies), "whose X-Forwarded-* count: addresses, networks, unix"
    )
    cors_origins: tuple[str, ...] = setting(
        (), checked(names, _origins), "origins whose pages may call, comma-separated; * is all"
    )
    cors_private_network: bool = setting(False, flag, "1 lets pages of the internet call a private address")
    proxy_key: str | None = setting(
        None, str, "key lent to pages of the proxy origins; give it the scope infer", is_secret=True
    )
    proxy_origins: tuple[str, ...] = setting((), checked(names, _origins), "origins that the proxy key is lent to")
    run_hosts: tuple[str, ...] = setting(_HOSTS.run, _hosts, "names of the host that runs")
    queue_hosts: tuple[str, ...] = setting(_HOSTS.queue, _hosts, "names of the host that queues")
    rest_hosts: tuple[str, ...] = setting(_HOSTS.rest, _hosts, "names of the host for uploads and tokens")
    files_hosts: tuple[str, ...] = setting(_HOSTS.files, _hosts, "names of the host of files")
    plain_hosts: tuple[str, ...] = setting((), _hosts, "names of this box that begin with queue. all the same")
    drain_s: float = setting(20.0, seconds, "how long calls and running jobs may go on at the end")
    max_image_mib: int = setting(100, positive, "largest input image, by URL or in the request")
    max_json_depth: int = setting(32, positive, "nesting of a request's JSON")
    max_json_values: int = setting(100_000, positive, "values in a request's JSON")
    max_images: int = setting(4, positive, "num_images of a request, at most 4")
    max_loras: int | None = setting(None, count, "LoRAs of a request; without it any number")
    requests_per_minute: float | None = setting(None, rate, "of one owner; without it any number")
    request_burst: int = setting(10, positive, "how many of them may come at once")
    result_report: bool = setting(True, flag, "0 leaves the object kontextd out of results")
    key_memory_s: float = setting(2.0, seconds, "a revoked key may go on working that long")
    upload_grant_s: float = setting(6 * 3600.0, seconds, "an upload has to be complete by then")

    def address_settings(self) -> AddressSettings:
        from kontextd_server.wire.addresses import AddressSettings

        hosts = HostNames(
            run=self.run_hosts,
            queue=self.queue_hosts,
            rest=self.rest_hosts,
            files=self.files_hosts,
            plain=self.plain_hosts,
        )
        return AddressSettings(public_url=self.public_url, trusted_proxies=self.trusted_proxies, names=hosts)

    def api_config(self, version: str, max_lora_scale: float) -> ApiConfig:
        from kontextd_server.api.config import ApiConfig, ApiLimits
        from kontextd_server.wire.cors import CorsSettings
        from kontextd_server.wire.front_door import DoorSettings
        from kontextd_server.wire.json_bodies import JsonLimits
        from kontextd_server.wire.proxy import Lending

        lending = Lending(self.proxy_key, frozenset(self.proxy_origins)) if self.proxy_key else None
        body = JsonLimits.for_files(self.max_image_mib * MIB)
        return ApiConfig(
            door=DoorSettings(
                addresses=self.address_settings(),
                cors=CorsSettings(self.cors_origins, self.cors_private_network),
                lending=lending,
            ),
            limits=ApiLimits(
                body=JsonLimits(body.max_bytes, self.max_json_depth, self.max_json_values),
                max_images=self.max_images,
                max_loras=self.max_loras,
                max_lora_scale=max_lora_scale,
                requests_per_minute=self.requests_per_minute,
                burst=self.request_burst,
            ),
            version=version,
            with_report=self.result_report,
            key_memory_s=self.key_memory_s,
            grant_s=self.upload_grant_s,
            drain_s=self.drain_s,
        )
