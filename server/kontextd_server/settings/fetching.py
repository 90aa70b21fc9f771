"""The settings of fetching inputs and of posting webhooks: what may be asked for, by which way, how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.settings.rows import MIB, checked, count, flag, names, path, seconds, setting

if TYPE_CHECKING:
    from kontextd_server.fetch import AllowList, FetchConfig, Proxy, PurposeRules
    from kontextd_server.fetch.roots import LoraRoots


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


def _roots(parts: tuple[str, ...]) -> None:
    from kontextd_server.fetch.roots import parse_roots

    parse_roots(parts)


def _token(text: str) -> None:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("use a token as the hub gave it: ASCII, without a space")


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
    lora_cache_mib: int = setting(32768, count, "disk for downloaded LoRA files")
    lora_roots: tuple[str, ...] = setting(
        (), checked(names, _roots), "folders of LoRA files by name: studio=/srv/loras,team=/mnt/loras"
    )
    hub_ids: bool = setting(False, flag, "1 fetches LoRAs by hub ids such as owner/name")
    hub_url: str = setting("https://huggingface.co", _url, "the hub that they are fetched from")
    hub_token: str | None = setting(
        None, checked(str, _token), "sent to the hub with them, for private and gated repositories", is_secret=True
    )

    def roots(self, library: Path) -> LoraRoots:
        """The LoRA roots, `library` one of them."""
        from kontextd_server.fetch.roots import LIBRARY, LoraRoots, parse_roots

        return LoraRoots({**parse_roots(self.lora_roots), LIBRARY: library})

    def fetch_config(self, cache: Path, max_image_mib: int, max_lora_mib: int) -> FetchConfig:
        """Raises `ValueError` for settings that do not go together."""
        from kontextd_server.fetch import FetchConfig
        from kontextd_server.fetch.rules import IMAGE_RULES, LORA_RULES, WEBHOOK_RULES

        image = replace(IMAGE_RULES, max_bytes=max_image_mib * MIB, total_s=self.fetch_image_timeout_s)
        lora = replace(LORA_RULES, max_bytes=max_lora_mib * MIB, total_s=self.fetch_lora_timeout_s)
        return FetchConfig(
            cache=cache,
            offline=self.offline,
            image=_ruled(image, self.fetch_allow_image, self.fetch_proxy_image),
            lora=_ruled(lora, self.fetch_allow_lora, self.fetch_proxy_lora),
            webhook=_ruled(WEBHOOK_RULES, self.fetch_allow_webhook, self.fetch_proxy_webhook),
            ca_bundle=self.fetch_ca_bundle,
            cache_bytes=self.lora_cache_mib * MIB,
            hub=self.hub_url,
            hub_ids=self.hub_ids,
            hub_token=self.hub_token,
        )


def _ruled(rules: PurposeRules, allow: AllowList | None, proxy: Proxy | None) -> PurposeRules:
    return replace(rules, allow=allow or rules.allow, proxy=proxy)
