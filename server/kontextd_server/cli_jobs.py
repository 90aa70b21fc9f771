"""`kontextd jobs`: list, show, cancel and retry jobs from the box itself. Knows the job store; knows no HTTP."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_action
from kontextd_server.cli_times import span_text
from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings

if TYPE_CHECKING:
    from kontextd_server.store import JobReport, Store

_STATES = ("queued", "running", "ok", "failed", "cancelled")
_MOST = 10_000
_SETTINGS = ("data", "database")


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = add_action(actions, "list", "the newest first", *_SETTINGS)
    listed.add_argument("--state", choices=_STATES, help="only these")
    listed.add_argument("--owner", metavar="NAME", help="only of keys of this name")
    listed.add_argument("--limit", type=int, default=50, metavar="N", help="how many at most; default: %(default)s")
    for name, text in (
        ("show", "all that is known of a job, with its log"),
        ("cancel", "take a job out of the queue, or stop it after its step"),
        ("retry", "queue a job again that failed or was cancelled"),
    ):
        add_action(actions, name, text, *_SETTINGS).add_argument("id", metavar="REQUEST_ID")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    from kontextd_server import parts

    with parts.job_store(settings) as store:
        match arguments.action:
            case "list":
                _list(store, arguments)
            case "show":
                _show(store, arguments)
            case "cancel":
                _say(arguments, _cancelled(store, arguments.id))
            case "retry":
                _say(arguments, _retried(store, arguments.id))
    return 0


def _list(store: Store, arguments: argparse.Namespace) -> None:
    from kontextd_server.store import JobFilter, JobState, Outcome

    if not 0 < arguments.limit <= _MOST:
        raise UsageError(f"--limit is {arguments.limit}; use 1 to {_MOST}.")
    states = {"queued": JobState.IN_QUEUE, "running": JobState.IN_PROGRESS}
    outcomes = {"ok": Outcome.OK, "failed": Outcome.FAILED, "cancelled": Outcome.CANCELLED}
    wanted = JobFilter(owner=arguments.owner, state=states.get(arguments.state), outcome=outcomes.get(arguments.state))
    reports = store.views.reports(wanted, limit=arguments.limit)
    if arguments.json:
        print(json.dumps([_told(report) for report in reports], indent=2))
    elif reports:
        print(_table(reports, store.database.clock()))


def _show(store: Store, arguments: argparse.Namespace) -> None:
    report = store.views.report(arguments.id)
    if report is None:
        raise _unknown(arguments.id)
    told, logs = _told(report), store.views.logs(arguments.id)
    if arguments.json:
        print(json.dumps({**told, "logs": [line.message for line in logs]}, indent=2))
        return
    for name, value in told.items():
        if value is not None:
            print(f"{name:16} {value}")
    for line in logs:
        print(f"{_time(line.timestamp)} {line.level:5} {line.message}")


def _cancelled(store: Store, request_id: str) -> str:
    from kontextd_server.store import CancelAnswer

    match store.jobs.request_cancel(request_id):
        case CancelAnswer.NOT_FOUND:
            raise _unknown(request_id)
        case CancelAnswer.ALREADY_COMPLETED:
            raise UsageError(f"the job {request_id} is completed already.")
        case CancelAnswer.ACCEPTED:
            return "cancelled"


def _retried(store: Store, request_id: str) -> str:
    from kontextd_server.store import RetryAnswer

    match store.jobs.retry(request_id):
        case RetryAnswer.NOT_FOUND:
            raise _unknown(request_id)
        case RetryAnswer.NOT_FAILED:
            report = store.views.report(request_id)
            state = "gone" if report is None else _state(report)
            raise UsageError(
                f"the job {request_id} is {state}: only one that failed or was cancelled can be run again."
            )
        case RetryAnswer.INPUT_ERASED:
            raise UsageError(f"the job {request_id} left no input behind, as its caller wished: submit it anew.")
        case RetryAnswer.QUEUED:
            return "queued"


def _say(arguments: argparse.Namespace, what: str) -> None:
    print(json.dumps({"request_id": arguments.id, "status": what}) if arguments.json else f"{arguments.id} {what}")


def _unknown(request_id: str) -> UsageError:
    return UsageError(f"there is no job {request_id!r}; see kontextd jobs list.")


def _table(reports: Sequence[JobReport], now: float) -> str:
    lines = [f"{'request':36}  {'owner':16}  {'state':9}  {'age':>7}  {'worker':24}  error"]
    for report in reports:
        job = report.job
        error = " ".join(f"{job.error_type}: {job.error_message or ''}".split()) if job.error_type else ""
        age = span_text(now - job.created_at)
        lines.append(
            f"{job.request_id:36}  {job.owner[:16]:16}  {_state(report):9}  {age:>7}  {(job.worker or '')[:24]:24}  "
            f"{error[:120]}".rstrip()
        )
    return "\n".join(lines)


def _state(report: JobReport) -> str:
    job = report.job
    if job.outcome is not None:
        return str(job.outcome).lower()
    return {"IN_QUEUE": "queued", "IN_PROGRESS": "running"}[job.state]


def _told(report: JobReport) -> dict[str, object]:
    job, webhook = report.job, report.webhook
    told: dict[str, object] = {
        "request_id": job.request_id,
        "endpoint": job.endpoint,
        "owner": job.owner,
        "key_id": job.key_id,
        "state": _state(report),
        "priority": job.priority.name.lower(),
        "queue_position": job.queue_position,
        "attempt": job.attempt,
        "worker": job.worker,
        "steps": None if job.steps_total is None else f"{job.steps_done}/{job.steps_total}",
        "inference_s": job.inference_s,
        "error_type": job.error_type,
        "error": job.error_message,
        "tags": None if job.tags is None else json.loads(job.tags),
    }
    times = {"created_at": job.created_at, "started_at": job.started_at, "finished_at": job.finished_at}
    told |= {name: None if at is None else _time(at) for name, at in times.items()}
    if webhook is not None:
        told |= {"webhook": f"{webhook.state}, {webhook.attempt} tries", "webhook_error": webhook.last_error}
    return told


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
