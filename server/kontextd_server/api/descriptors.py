"""Open files and sockets: how many a process may have, and a line in the log when none is left. Knows no HTTP."""

from __future__ import annotations

import errno
import logging
import os
import resource

log = logging.getLogger(__name__)

_MOST = 1_048_576  # Linux's own limit (fs.nr_open); a container's may read as endless
_SECONDS_BETWEEN_LINES = 60.0


def raise_limit() -> None:
    """To the most that this process may give itself: the usual 1024 are for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of open files stays at %d, and could not be raised to %d: %s", soft, wanted, error)


class Shortage:
    """Says that none is left, once a minute at most: uvloop closes whom it cannot accept, and says nothing."""

    def __init__(self) -> None:
        self._said_at: float | None = None

    def look(self, now: float, connections: int) -> None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            is_said = self._said_at is not None and now - self._said_at < _SECONDS_BETWEEN_LINES
            if error.errno in (errno.EMFILE, errno.ENFILE) and not is_said:
                self._said_at = now
                log.error(
                    "no descriptor is left for a connection or a file (%s; limit %d, %d connections): whoever connects "
                    "is turned away. Raise the limit with LimitNOFILE= or ulimit -n.",
                    os.strerror(error.errno),
                    resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                    connections,
                )
