"""What the routes work with, put together once. Knows the stores and the gate; knows no routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kontextd_server.api.access import Gate, RememberedKeys
from kontextd_server.api.config import ApiConfig
from kontextd_server.api.drain import Drain
from kontextd_server.api.rates import RateLimit
from kontextd_server.api.threads import OffLoop
from kontextd_server.api.waiting import Wakeups
from kontextd_server.files import FileStore, GrantSigner
from kontextd_server.lora_library import LoraLibrary
from kontextd_server.store import Store, Watcher
from kontextd_server.wire.tokens import TokenSigner
from kontextd_server.wire.webhooks import WebhookKey


@dataclass(frozen=True)
class ApiParts:
    """What the process is given. `check_webhook` blocks, and raises `FetchError` for an address that is not allowed.

    The first of `webhook_keys` signs; a former one is listed as well for a day. Who made `watcher` and `store` closes
    them, in this order.
    """

    store: Store
    watcher: Watcher
    files: FileStore
    tokens: TokenSigner
    grants: GrantSigner
    webhook_keys: tuple[WebhookKey, ...]
    check_webhook: Callable[[str], None]
    drain: Drain
    library: LoraLibrary
    lora_roots: tuple[str, ...]  # their names


class Api:
    """All of it, for the routes."""

    def __init__(self, config: ApiConfig, parts: ApiParts) -> None:
        self.config, self.parts = config, parts
        self.store, self.files, self.drain = parts.store, parts.files, parts.drain
        self.off_loop = OffLoop(config.threads)
        self.wakeups = Wakeups(parts.watcher, config.poll_s)
        self.gate = Gate(RememberedKeys(parts.store.keys, config.key_memory_s), parts.tokens, self.off_loop)
        self.rate = RateLimit(config.limits.requests_per_minute, config.limits.burst)
