"""What `every_call.cjs` has to tell, whichever way its client went."""

from __future__ import annotations

from typing import Any

from kontextd_server.store import Priority

from .box import LiveBox
from .expected import STEPS, check_lines, check_output

Told = dict[str, Any]
LARGE = 91 * 2**20  # above 90 MiB the client uploads in parts


def check_every_call(told: Told, box: LiveBox, files: str) -> None:
    check_followed(told["followed"], box, files)
    check_uploads(told["uploaded"], files)
    check_interruptions(told["interrupted"])
    check_refusals(told["refused"])


def check_followed(followed: Told, box: LiveBox, files: str) -> None:
    """A status stream: states to the end, each line once."""
    assert followed["states"][-1] == "COMPLETED"
    assert set(followed["states"]) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    check_lines(followed["lines"])
    assert len(followed["lines"]) == STEPS
    check_output(followed["subscribed"]["data"], files)
    with box.store() as store:
        job = store.views.status(followed["requestId"])
    assert job
    assert job.priority is Priority.LOW


def check_uploads(uploaded: Told, files: str) -> None:
    assert uploaded["url"].startswith(files)
    assert uploaded["same"]
    check_output(uploaded["edited"]["data"], files)


def check_interruptions(interrupted: Told) -> None:
    late, result, impatient = interrupted["late"], interrupted["result"], interrupted["impatient"]
    assert (late["is"], late["status"], late["isUserTimeout"]) == (["ApiError"], 504, True)
    assert interrupted["cancelled"]["error_type"] == "client_cancelled"
    assert (result["is"], result["status"]) == (["ApiError"], 499)
    assert (impatient["name"], impatient["is"]) == ("Error", [])
    assert "timed out" in impatient["message"]
    assert interrupted["given_up"]["error_type"] == "client_cancelled"


def check_refusals(refused: Told) -> None:
    invalid, unloadable = refused["invalid"], refused["unloadable"]
    assert (invalid["name"], invalid["status"]) == ("ValidationError", 422)
    assert invalid["is"] == ["ApiError", "ValidationError"]
    assert invalid["fields"] == [{"at": "body.image_url", "type": "missing"}]
    assert (unloadable["name"], unloadable["status"]) == ("ValidationError", 422)
    assert [field["at"] for field in unloadable["fields"]] == ["body.image_url"]
    for name, status in (("unknown", 404), ("stranger", 401)):
        assert (refused[name]["name"], refused[name]["status"]) == ("ApiError", status)
        assert refused[name]["requestId"]
