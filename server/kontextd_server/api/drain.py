"""How the process comes to its end: nothing new is accepted, open calls get some time. Knows time; ends nothing."""

from __future__ import annotations

import math
import time

from kontextd_server.wire.errors import NotAccepted


class Drain:
    """`begin` may be called from any thread; whoever waits looks every few seconds."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._over_at = math.inf

    def begin(self) -> None:
        """From now on nothing is accepted."""
        if not self.has_begun:
            self._over_at = time.monotonic() + self.grace_s

    @property
    def has_begun(self) -> bool:
        return self._over_at < math.inf

    def check_open(self) -> None:
        """Raises `NotAccepted` once it has begun."""
        if self.has_begun:
            raise NotAccepted("the server is going down and accepts nothing new. Send the request again.")

    def check_not_over(self) -> None:
        """Raises `NotAccepted` once the time of open calls is over."""
        if time.monotonic() >= self._over_at:
            raise NotAccepted("the server is going down and ends open calls. Send the request again.")
