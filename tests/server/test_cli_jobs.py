"""`kontextd jobs` as an operator meets it: jobs in every state, in a real store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kontextd_server.cli import main
from kontextd_server.store import (
    Claim,
    Failure,
    JobState,
    LogLine,
    NewJob,
    Outcome,
    Priority,
    Progress,
    Queued,
    Store,
    Success,
    migrate,
    open_store,
    sqlite_url,
)

ENDPOINT = "fal-ai/flux-kontext-lora"
FAILED = Failure("internal_server_error", 500, b'{"detail": []}', "out of\nmemory:\tfewer pixels")
Jobs = Callable[..., int]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "template.sqlite"
    migrate(sqlite_url(path))
    return path


@pytest.fixture
def store(tmp_path: Path, template: Path) -> Iterator[Store]:
    """The store of the data folder `tmp_path`."""
    shutil.copy(template, tmp_path / "jobs.sqlite")
    opened = open_store(sqlite_url(tmp_path / "jobs.sqlite"))
    yield opened
    opened.close()


@pytest.fixture
def jobs(store: Store, tmp_path: Path) -> Jobs:
    return lambda action, *arguments: main(["jobs", action, "--data", str(tmp_path), *arguments])


def queued(store: Store, owner: str = "anna", **fields: object) -> str:
    answer = store.jobs.enqueue(NewJob(**{"endpoint": ENDPOINT, "owner": owner, "payload": b"{}"} | fields))
    assert isinstance(answer, Queued)
    return answer.request_id


def claimed(store: Store) -> Claim:
    claim = store.leases.claim("box-worker-0-1a2b")
    assert claim is not None
    return claim


def one_of_each(store: Store) -> dict[str, str]:
    """A job in each state, by the name of the state; the oldest first."""
    ids = {}
    for state, ending in (("ok", Success(b"{}")), ("failed", FAILED)):
        ids[state] = queued(store)
        store.leases.finish(claimed(store).lease, ending)
    ids["cancelled"] = queued(store, "bert")
    store.jobs.request_cancel(ids["cancelled"])
    ids["running"] = queued(store, "bert")
    claimed(store)
    ids["queued"] = queued(store)
    return ids


def listed(jobs: Jobs, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert jobs("list", "--json", *arguments) == 0
    told: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return told


def test_list_shows_the_newest_first_with_owner_state_age_worker_and_error(
    store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = one_of_each(store)
    assert jobs("list") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["request", "owner", "state", "age", "worker", "error"]
    assert [line.split()[0] for line in lines] == list(reversed(ids.values()))
    by_state = dict(zip(ids, reversed(lines), strict=True))
    assert by_state["running"].split()[1:3] == ["bert", "running"]
    assert "box-worker-0-1a2b" in by_state["running"]
    assert by_state["failed"].endswith("internal_server_error: out of memory: fewer pixels")
    assert by_state["cancelled"].endswith("client_cancelled: The request was cancelled.")
    assert by_state["queued"].split()[:3] == [ids["queued"], "anna", "queued"]


def test_list_of_nothing_is_empty(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs("list") == 0
    assert capsys.readouterr().out == ""
    assert listed(jobs, capsys) == []


def test_list_can_be_narrowed(store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    ids = one_of_each(store)
    for state, request_id in ids.items():
        (job,) = listed(jobs, capsys, "--state", state)
        assert (job["request_id"], job["state"]) == (request_id, state)
    assert {job["owner"] for job in listed(jobs, capsys, "--owner", "bert")} == {"bert"}
    assert len(listed(jobs, capsys, "--owner", "bert")) == 2
    assert [job["state"] for job in listed(jobs, capsys, "--limit", "2")] == ["queued", "running"]
    assert listed(jobs, capsys, "--owner", "nobody") == []


@pytest.mark.parametrize("limit", ["0", "-1", "10001"])
def test_a_limit_that_cannot_be_is_refused(jobs: Jobs, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert jobs("list", "--limit", limit) == 2
    assert f"--limit is {limit}; use 1 to 10000." in capsys.readouterr().err


def test_show_tells_all_there_is(store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    request_id = queued(store, priority=Priority.LOW, tags='{"team": "design"}', key_id="k1", webhook_url="http://x/")
    claim = claimed(store)
    line = LogLine(" 50%|█████     | 1/2 [00:01<00:01,  1.00it/s]", 1_700_000_000.0)
    store.leases.renew(claim.lease, logs=[line], progress=Progress(1, 2))
    store.leases.finish(claim.lease, FAILED)
    assert jobs("show", request_id, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in ("request_id", "endpoint", "owner", "key_id", "state", "priority")} == {
        "request_id": request_id,
        "endpoint": ENDPOINT,
        "owner": "anna",
        "key_id": "k1",
        "state": "failed",
        "priority": "low",
    }
    assert (told["attempt"], told["steps"], told["tags"]) == (1, "1/2", {"team": "design"})
    assert (told["error_type"], told["error"]) == (FAILED.error_type, FAILED.message)
    assert told["webhook"] == "pending, 0 tries"
    assert told["logs"] == [line.message]
    assert told["created_at"] <= told["started_at"] <= told["finished_at"]

    assert jobs("show", request_id) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"request_id       {request_id}" in lines
    assert lines[-1] == f"2023-11-14T22:13:20.000+00:00 INFO  {line.message}"
    assert not any(line.startswith("queue_position") for line in lines)  # what is not known is left out


def test_cancel_takes_a_job_out_of_the_queue_and_marks_a_running_one(
    store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = one_of_each(store)
    assert jobs("cancel", ids["queued"]) == 0
    assert capsys.readouterr().out == f"{ids['queued']} cancelled\n"
    assert jobs("cancel", ids["running"], "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"request_id": ids["running"], "status": "cancelled"}
    waiting, running = store.views.status(ids["queued"]), store.views.status(ids["running"])
    assert waiting is not None
    assert running is not None
    assert (waiting.outcome, running.state, running.cancel_requested) == (
        Outcome.CANCELLED,
        JobState.IN_PROGRESS,
        True,
    )
    assert jobs("cancel", ids["ok"]) == 2
    assert "is completed already." in capsys.readouterr().err


def test_retry_queues_what_failed_or_was_cancelled_and_nothing_else(
    store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = one_of_each(store)
    for state in ("failed", "cancelled"):
        assert jobs("retry", ids[state]) == 0
        assert capsys.readouterr().out == f"{ids[state]} queued\n"
        job = store.views.status(ids[state])
        assert job is not None
        assert (job.state, job.error_type) == (JobState.IN_QUEUE, None)
    for state in ("ok", "running", "queued"):
        assert jobs("retry", ids[state]) == 2
        assert capsys.readouterr().err == (
            f"kontextd: the job {ids[state]} is {state}: only one that failed or was cancelled can be run again.\n"
        )


def test_a_job_that_leaves_nothing_behind_cannot_be_retried(
    store: Store, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    request_id = queued(store, transient=True)
    store.leases.finish(claimed(store).lease, FAILED)
    assert jobs("retry", request_id) == 2
    assert "left no input behind, as its caller wished: submit it anew." in capsys.readouterr().err


@pytest.mark.parametrize("action", ["show", "cancel", "retry"])
def test_an_unknown_job_is_told_as_one(jobs: Jobs, capsys: pytest.CaptureFixture[str], action: str) -> None:
    assert jobs(action, "nope") == 2
    assert capsys.readouterr().err == "kontextd: there is no job 'nope'; see kontextd jobs list.\n"


@pytest.mark.parametrize("action", [["list"], ["show", "x"], ["cancel", "x"], ["retry", "x"]])
def test_where_there_is_no_store_none_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    data = tmp_path / "mistyped"
    assert main(["jobs", *action, "--data", str(data)]) == 2
    assert "there is no job store at" in capsys.readouterr().err
    assert not data.exists()
