"""A cache with a byte budget that forgets what was used longest ago. Knows no tensors and no models."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What a cache holds says how much memory it takes."""

    @property
    def size_bytes(self) -> int: ...


Value = TypeVar("Value", bound=Sized)


class ByteLRU(Generic[Value]):
    """Values by key, the least recently used ones dropped as soon as all of them exceed `budget_bytes`.

    A value larger than the whole budget is not kept; a budget of 0 keeps nothing. Used by one thread at a time.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value, which thereby is the most recently used one; None where there is none."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return value

    def put(self, key: str, value: Value) -> None:
        """Keep the value, in place of any other under that key."""
        self._drop(key)
        if value.size_bytes > self.budget_bytes:
            return
        self._values[key] = value
        self.used_bytes += value.size_bytes
        while self.used_bytes > self.budget_bytes:
            self._drop(next(iter(self._values)))

    def clear(self) -> None:
        """Forget everything; hits and misses are counted on."""
        self._values.clear()
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def _drop(self, key: str) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.used_bytes -= value.size_bytes


def content_key(*parts: bytes | str | int) -> str:
    """SHA-256 over the parts. Each carries its type and length, so that no two lists of parts run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
