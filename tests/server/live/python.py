"""What `every_call.py` has to tell, whichever way its client went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kontextd_server.store import Priority

from .box import LiveBox
from .expected import STEPS, check_lines, check_output, check_stream

Told = dict[str, Any]
EVERY_CALL = Path(__file__).parent / "every_call.py"


def check_calls(told: Told, box: LiveBox, *, files: str, queue: str) -> None:
    """All but uploads. Addresses of files and of requests begin as given."""
    check_output(told["ran"]["output"], files)
    check_stream(told["ran"]["streamed"], files)
    check_subscribed(told["subscribed"], box, files)
    check_queued(told["queued"], box, files, queue)
    assert told["interrupted"]["late"] == {"status": 504, "type": "request_timeout"}
    assert told["interrupted"]["ended"] == "client_cancelled"
    assert told["interrupted"]["result"] == {"status": 499, "type": "client_cancelled"}
    assert told["refused"]["invalid"] == {"status": 422, "type": "missing"}
    assert told["refused"]["unknown"] == {"status": 404, "type": "not_found"}
    assert told["refused"]["broken_stream"] == "SSEError"  # what the client makes of an error before the first event


def check_subscribed(subscribed: Told, box: LiveBox, files: str) -> None:
    check_output(subscribed["output"], files)
    check_lines(subscribed["lines"])
    assert len(subscribed["lines"]) == STEPS
    (request_id,) = subscribed["enqueued"]
    with box.store() as store:
        assert store.views.status(request_id)


def check_queued(queued: Told, box: LiveBox, files: str, queue: str) -> None:
    check_output(queued["got"], files)
    assert queued["result"] == queued["got"]
    assert [url for url in queued["urls"] if not url.startswith(queue)] == []
    assert (queued["events"][-1], queued["status"], queued["lines"]) == ("Completed", "Completed", STEPS)
    assert set(queued["events"]) <= {"Queued", "InProgress", "Completed"}
    with box.store() as store:
        job = store.views.status(queued["request_id"])
    assert job
    assert (job.priority, job.start_by is not None) == (Priority.LOW, True)


def check_uploads(uploaded: Told, big_sha256: str, files: str) -> None:
    assert [url for url in uploaded["urls"] if not url.startswith(files)] == []
    check_output(uploaded["edited"], files)
    assert uploaded["big"] == big_sha256
    text, content_type = uploaded["text"]
    assert (text, content_type.partition(";")[0]) == ("Hello, World!", "text/plain")
    assert uploaded["fallen_back"] == "by the other way"
