"""What an operator sets for the API process: frozen records with defaults. Knows no environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kontextd_server.wire.endpoints import ENDPOINTS, Endpoint
from kontextd_server.wire.front_door import DoorSettings
from kontextd_server.wire.json_bodies import JsonLimits
from kontextd_server.wire.sse import KEEP_ALIVE_S


@dataclass(frozen=True)
class ApiLimits:
    """How much one request, and one owner, may ask for; None is no limit.

    `body` bounds what holds an input, and with it a picture as a data URI; `small_body` all other JSON.
    """

    body: JsonLimits = field(default_factory=JsonLimits)
    small_body: JsonLimits = field(default_factory=lambda: JsonLimits(max_bytes=2**20))
    max_images: int = 4
    max_loras: int | None = None
    max_lora_scale: float = 10.0  # either sign
    requests_per_minute: float | None = None  # of one owner: run, stream and submit together
    burst: int = 10  # how many of them may come at once


@dataclass(frozen=True)
class Threads:
    """How many calls that block may be under way at once: together fewer than the store has connections."""

    reads: int = 8
    writes: int = 8
    files: int = 16
    checks: int = 8  # of webhook addresses, which ask a name server


@dataclass(frozen=True)
class ApiConfig:
    """Seconds where a name ends in `_s`. `with_report` False leaves our own object `kontextd` out of results.

    `poll_s`: how often who waits looks without being woken. `key_memory_s`: a revoked key may go on working that long.
    """

    door: DoorSettings = field(default_factory=DoorSettings)
    limits: ApiLimits = field(default_factory=ApiLimits)
    threads: Threads = field(default_factory=Threads)
    table: Sequence[Endpoint] = ENDPOINTS
    version: str = "0"
    with_report: bool = True
    poll_s: float = 2.0
    keep_alive_s: float = KEEP_ALIVE_S
    key_memory_s: float = 2.0
    grant_s: float = 6 * 3600.0  # an upload has to be complete by then
    files_token_s: float = 6 * 3600.0
    drain_s: float = 20.0  # how long open calls may go on when the process is to end
