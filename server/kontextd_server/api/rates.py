"""How many requests an owner may send in a time. Knows names and time; in memory, of one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from kontextd_server.wire.errors import RateLimited


@dataclass
class _Bucket:
    tokens: float
    at_s: float


class RateLimit:
    """A bucket of `burst` tokens for each owner, filled at `per_minute`; None lets everything pass.

    Owners are names of valid keys, so there are never more buckets than keys.
    """

    def __init__(self, per_minute: float | None, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = None if per_minute is None else per_minute / 60
        self._burst, self._clock = burst, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, owner: str) -> None:
        """Raises `RateLimited`, which says when to come again."""
        if self._per_s is None:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(owner, _Bucket(float(self._burst), now))
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at_s) * self._per_s)
        bucket.at_s = now
        if bucket.tokens < 1:
            wait_s = math.ceil((1 - bucket.tokens) / self._per_s)
            told = f"{owner!r} sends more than {self._per_s * 60:g} requests a minute. Try again in {wait_s} s."
            raise RateLimited(told, retry_after_s=wait_s)
        bucket.tokens -= 1
