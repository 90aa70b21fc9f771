"""What a watcher can wait for. Knows no database."""

from __future__ import annotations

QUEUE = "queue"  # a job can be claimed
WEBHOOKS = "webhooks"  # a webhook is due


def job(request_id: str) -> str:
    """Something happened to this job: its state, its log, its preview."""
    return f"job/{request_id}"
