"""How far the end of a worker process has come, as its threads share it. Knows nothing of their work."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stopping:
    """`no_more_jobs`: the running one is the last. `hand_back`: it is to be given up, for another worker."""

    no_more_jobs: threading.Event = field(default_factory=threading.Event)
    hand_back: threading.Event = field(default_factory=threading.Event)
