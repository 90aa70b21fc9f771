"""What an operator sets for fetching: one frozen record for all, one for each purpose. Knows no environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kontextd_server.fetch.addresses import AllowList, Purpose
from kontextd_server.fetch.errors import InvalidReference
from kontextd_server.fetch.urls import Target, parse

_MIB = 2**20


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. `auth` is user and password, sent to it alone."""

    target: Target
    auth: tuple[str, str] | None = None

    @classmethod
    def parse(cls, url: str) -> Proxy:
        """Of `http://proxy.studio.lan:3128` or `http://user:password@…`. Raises `ValueError` with the remedy."""
        scheme, mark, rest = url.strip().partition("://")
        authority, slash, path = rest.partition("/")
        login, at, server = authority.rpartition("@")
        user, _, password = login.partition(":")
        try:
            return cls(parse(f"{scheme}{mark}{server}{slash}{path}"), (user, password) if at else None)
        except InvalidReference as error:
            raise ValueError("a proxy is an address such as http://proxy.studio.lan:3128") from error


@dataclass(frozen=True)
class PurposeRules:
    """Limits of one purpose: sizes in bytes, times in seconds.

    `fresh_s`: for so long after a download the same URL is answered from the cache without asking its server.
    `keep_s`: an entry that nobody used for so long is removed.
    """

    allow: AllowList = field(default_factory=AllowList)
    proxy: Proxy | None = None
    max_bytes: int = 100 * _MIB
    total_s: float = 20.0
    idle_s: float = 10.0
    connect_s: float = 5.0
    max_redirects: int = 5
    attempts: int = 2
    fresh_s: float = 0.0
    keep_s: float = 60.0

    def __post_init__(self) -> None:
        if self.proxy is not None and not self.allow:
            raise ValueError("a proxy resolves names itself, so the hosts it may be asked for must be listed")


IMAGE_RULES = PurposeRules()
LORA_RULES = PurposeRules(
    max_bytes=4096 * _MIB, total_s=900.0, idle_s=30.0, attempts=5, fresh_s=300.0, keep_s=30 * 86400.0
)
# fal gives a receiver 15 s, however it spends them.
WEBHOOK_RULES = PurposeRules(max_bytes=64 * 1024, total_s=15.0, idle_s=15.0, max_redirects=0, attempts=1)


@dataclass(frozen=True)
class FetchConfig:
    """`cache` is a folder of this box alone. `ca_bundle` is trusted besides the system's certificates.

    `hub_ids`: whether ids such as owner/name are fetched from the hub. `hub_token` is sent to it with them, and to
    nobody else.
    """

    cache: Path
    offline: bool = False
    image: PurposeRules = IMAGE_RULES
    lora: PurposeRules = LORA_RULES
    webhook: PurposeRules = WEBHOOK_RULES
    ca_bundle: Path | None = None
    cache_bytes: int = 32 * 1024 * _MIB
    hub: str = "https://huggingface.co"
    hub_ids: bool = False
    hub_token: str | None = field(default=None, repr=False)
    agent: str = "kontextd"

    def __post_init__(self) -> None:
        if self.ca_bundle is not None and not self.ca_bundle.is_file():
            raise ValueError(f"the CA bundle {self.ca_bundle} is no file; it holds certificates in PEM")

    def rules(self, purpose: Purpose) -> PurposeRules:
        return {Purpose.IMAGE: self.image, Purpose.LORA: self.lora, Purpose.WEBHOOK: self.webhook}[purpose]
