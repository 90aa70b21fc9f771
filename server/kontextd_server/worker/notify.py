"""What a process tells whoever started it, in the words of sd_notify(3). Knows sockets; knows no jobs and no children.

The words are systemd's, so a worker runs under systemd (`Type=notify`, `WatchdogSec=`) as under our own supervisor.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

ADDRESS_VARIABLE = "NOTIFY_SOCKET"
READY = "READY=1"
ALIVE = "WATCHDOG=1"
HUNG = "WATCHDOG=trigger"
STOPPING = "STOPPING=1"
_MAX_BYTES = 4096


class Notifier:
    """Sends words to an address; without one, and where nobody listens any more, they go nowhere. Never waits."""

    def __init__(self, address: str | None) -> None:
        # sd_notify(3): a leading @ stands for the NUL byte of an abstract socket.
        self._address = f"\0{address[1:]}" if address and address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        return cls(environment.get(ADDRESS_VARIABLE) or None)

    def tell(self, *words: str) -> None:
        if self._socket is None or self._address is None:
            return
        try:
            self._socket.sendto("\n".join(words).encode(), self._address)
        except OSError as error:  # a full queue, or the listener is gone: it learns enough from our silence
            log.debug("%s could not be told: %s", words, error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class NotifySocket:
    """Hears what one process says. Its folder keeps other users out: an abstract address would not."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.address)

    def heard(self) -> list[str]:
        """The words since the last call."""
        words: list[str] = []
        while True:
            try:
                words += self._socket.recv(_MAX_BYTES).decode("utf-8", "replace").splitlines()
            except BlockingIOError:
                return words

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
