"""The settings of fetching inputs and of posting webhooks: what may be asked for, by which way, how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.settings.rows import MIB, count, flag, names, path, positive, seconds, setting

if TYPE_CHECKING:
    from kontextd_server.fetch import AllowList, FetchConfig, Proxy, PurposeRules


def _allow(text: str) -> AllowList:
    from kontextd_server.fetch import AllowList

    return AllowList.parse(names(text))


def _proxy(text: str) -> Proxy:
    from kontextd_server.fetch import Proxy

    return Proxy.parse(text)


def _file(text: str) -> Path:
    if (found := path(text)).is_file():
        return found
    raise ValueError("there is no such file; use one with certificates in PEM")


def _url(text: str) -> str:
    if text.startswith(("https://", "http://")):
        return text.rstrip("/")
    raise ValueError("use an address such as https://huggingface.co")


@dataclass(frozen=True)
class FetchSettings:
    offline: bool = setting(False, flag, "1 fetches nothing: the mirror and our own files only")
    fetch_allow_image: AllowList | None = setting(None, _allow, "hosts, *.domains and networks images may come from")
    fetch_allow_lora: AllowList | None = setting(None, _allow, "the same for LoRA files")
    fetch_allow_webhook: AllowList | None = setting(None, _allow, "the same for the receivers of webhooks")
    fetch_proxy_image: Proxy | None = setting(None, _proxy, "HTTP proxy to fetch images through", is_secret=True)
    fetch_proxy_lora: Proxy | None = setting(None, _proxy, "the same for LoRA files", is_secret=True)
    fetch_proxy_webhook: Proxy | None = setting(None, _proxy, "the same for webhooks", is_secret=True)
    fetch_ca_bundle: Path | None = setting(None, _file, "CA certificates to trust besides the system's, PEM")
    fetch_image_timeout_s: float = setting(20.0, seconds, "an image has to be there by then")
    fetch_lora_timeout_s: float = setting(900.0, seconds, "a LoRA file has to be there by then")
    max_lora_mib: int = setting(4096, positive, "largest LoRA file")
    lora_cache_mib: int = setting(32768, count, "disk for downloaded LoRA files")
    hub_url: str = setting("https://huggingface.co", _url, "where hub ids such as owner/name are fetched from")

    def fetch_config(self, cache: Path, max_image_mib: int) -> FetchConfig:
        """Raises `ValueError` for settings that do not go together."""
        from kontextd_server.fetch import FetchConfig
        from kontextd_server.fetch.rules import IMAGE_RULES, LORA_RULES, WEBHOOK_RULES

        image = replace(IMAGE_RULES, max_bytes=max_image_mib * MIB, total_s=self.fetch_image_timeout_s)
        lora = replace(LORA_RULES, max_bytes=self.max_lora_mib * MIB, total_s=self.fetch_lora_timeout_s)
        return FetchConfig(
            cache=cache,
            offline=self.offline,
            image=_ruled(image, self.fetch_allow_image, self.fetch_proxy_image),
            lora=_ruled(lora, self.fetch_allow_lora, self.fetch_proxy_lora),
            webhook=_ruled(WEBHOOK_RULES, self.fetch_allow_webhook, self.fetch_proxy_webhook),
            ca_bundle=self.fetch_ca_bundle,
            cache_bytes=self.lora_cache_mib * MIB,
            hub=self.hub_url,
        )


def _ruled(rules: PurposeRules, allow: AllowList | None, proxy: Proxy | None) -> PurposeRules:
    return replace(rules, allow=allow or rules.allow, proxy=proxy)
