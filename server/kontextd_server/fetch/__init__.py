"""Fetching of inputs under rules: which addresses, how much, how long. Knows no jobs, no HTTP of ours, no engine."""

from kontextd_server.fetch.addresses import AllowList, Purpose
from kontextd_server.fetch.fetcher import Fetched, Fetcher, Source
from kontextd_server.fetch.rules import IMAGE_RULES, LORA_RULES, WEBHOOK_RULES, FetchConfig, Proxy, PurposeRules
from kontextd_server.fetch.web import Web

__all__ = [
    "IMAGE_RULES",
    "LORA_RULES",
    "WEBHOOK_RULES",
    "AllowList",
    "FetchConfig",
    "Fetched",
    "Fetcher",
    "Proxy",
    "Purpose",
    "PurposeRules",
    "Source",
    "Web",
]
