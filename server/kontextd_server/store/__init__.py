"""The job store: jobs, leases, results, webhooks, keys, workers in SQLite or PostgreSQL. The only thing that knows SQL.

    migrate(url)                          once, before anybody opens it
    store = open_store(url)
    store.jobs       enqueue, request_cancel, retry         what callers change
    store.views      status, logs, result, jobs, gauges     what is read
    store.leases     claim, renew, finish, release, sweep   what workers do
    store.webhooks, store.keys, store.workers, store.retention
    store.watch()                         wake-ups

A job is IN_QUEUE, IN_PROGRESS or COMPLETED, the last with an outcome:

    enqueue ─▶ IN_QUEUE ──claim──▶ IN_PROGRESS ──finish──▶ COMPLETED: OK, FAILED
                 │  ▲                  │  │                    │
                 │  └─ release, sweep ─┘  └─ sweep, no runs left ─▶ FAILED
                 └─ request_cancel ─▶ CANCELLED;  retry: FAILED, CANCELLED ─▶ IN_QUEUE

`request_cancel` of a running job is a mark: whatever takes the job out of IN_PROGRESS then makes it CANCELLED.
"""

from kontextd_server.store import topics
from kontextd_server.store.database import sqlite_url
from kontextd_server.store.errors import KeyRefused, SchemaMismatch, StoreError, StoreUnavailable, UnsupportedDatabase
from kontextd_server.store.migrate import migrate
from kontextd_server.store.policy import Policy
from kontextd_server.store.readings import Delivery, Gauges, Job, JobFilter, JobReport, Preview, Result, WebhookReport
from kontextd_server.store.records import (
    CANCELLED,
    NOT_STARTED_IN_TIME,
    WORKERS_LOST,
    ApiKey,
    CancelAnswer,
    Claim,
    Failure,
    FinishAnswer,
    JobKind,
    JobState,
    Lease,
    LogLine,
    NewJob,
    NewKey,
    Outcome,
    Priority,
    Progress,
    Pruned,
    Queued,
    Refusal,
    RetryAnswer,
    Scope,
    Standing,
    Success,
    Swept,
    WebhookState,
    Work,
    Worker,
    WorkerState,
)
from kontextd_server.store.store import Store, open_store
from kontextd_server.store.watch import Subscription, Watcher

__all__ = [
    "CANCELLED",
    "NOT_STARTED_IN_TIME",
    "WORKERS_LOST",
    "ApiKey",
    "CancelAnswer",
    "Claim",
    "Delivery",
    "Failure",
    "FinishAnswer",
    "Gauges",
    "Job",
    "JobFilter",
    "JobKind",
    "JobReport",
    "JobState",
    "KeyRefused",
    "Lease",
    "LogLine",
    "NewJob",
    "NewKey",
    "Outcome",
    "Policy",
    "Preview",
    "Priority",
    "Progress",
    "Pruned",
    "Queued",
    "Refusal",
    "Result",
    "RetryAnswer",
    "SchemaMismatch",
    "Scope",
    "Standing",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Subscription",
    "Success",
    "Swept",
    "UnsupportedDatabase",
    "Watcher",
    "WebhookReport",
    "WebhookState",
    "Work",
    "Worker",
    "WorkerState",
    "migrate",
    "open_store",
    "sqlite_url",
    "topics",
]
