"""The tables. Knows column types and indexes; knows nothing of how rows change.

Payloads live apart from jobs, so that a heartbeat never rewrites a row of many megabytes. Times are seconds since the
epoch. A change here needs a migration: a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from kontextd_server.store.records import JobKind, JobState, Outcome, WebhookState, WorkerState

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Text(sa.TypeDecorator[str]):
    """Text of any origin. What a database cannot hold, a NUL or half a surrogate pair, is replaced, in searches too."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is None:
            return None
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


class BodyKind(StrEnum):
    """What a payload is to its job."""

    INPUT = "input"
    RESULT = "result"
    PREVIEW = "preview"


def _enum(members: type[StrEnum]) -> sa.Enum:
    return sa.Enum(members, native_enum=False, length=16, values_callable=lambda kind: [str(member) for member in kind])


def _rising_id() -> sa.Column[int]:
    # SQLite numbers rows by itself only in an INTEGER column.
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)


def _job_id(primary_key: bool = False) -> sa.Column[int]:
    return sa.Column(
        "job_id", sa.BigInteger, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=primary_key, nullable=False
    )


jobs = sa.Table(
    "jobs",
    metadata,
    _rising_id(),  # also the order of arrival
    sa.Column("request_id", Text, nullable=False, unique=True),
    sa.Column("endpoint", Text, nullable=False),
    sa.Column("owner", Text, nullable=False),
    sa.Column("key_id", Text),
    sa.Column("kind", _enum(JobKind), nullable=False),
    sa.Column("state", _enum(JobState), nullable=False),
    sa.Column("outcome", _enum(Outcome)),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("lora_key", Text, nullable=False),
    sa.Column("runner_hint", Text),
    sa.Column("transient", sa.Boolean, nullable=False),
    sa.Column("tags", Text),
    sa.Column("webhook_url", Text),
    sa.Column("base_url", Text),
    sa.Column("files_expire_s", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("start_by", sa.Double),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("runs_allowed", sa.Integer, nullable=False),
    sa.Column("runs_left", sa.Integer, nullable=False),
    sa.Column("worker", Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("steps_done", sa.Integer),
    sa.Column("steps_total", sa.Integer),
    sa.Column("error_type", Text),
    sa.Column("error_message", Text),
    sa.Column("http_status", sa.SmallInteger),
    sa.Column("inference_s", sa.Double),
    sa.Column("images", sa.SmallInteger),
    sa.Column("prompt_hit", sa.Boolean),
    sa.Column("reference_hit", sa.Boolean),
    sa.Column("merge_s", sa.Double),
    sa.Column("lora_hit", sa.Boolean),
    sa.Column("lora_load_s", sa.Double),
    sa.CheckConstraint("(state = 'COMPLETED') = (outcome IS NOT NULL)", name="completed_has_an_outcome"),
    sa.CheckConstraint("(state = 'IN_PROGRESS') = (lease_until IS NOT NULL)", name="running_has_a_lease"),
    sa.Index(None, "state", "priority", "id"),  # claim, queue position, reaping
    sa.Index(None, "owner", "state"),
    sa.Index(None, "finished_at"),
    sqlite_autoincrement=True,  # numbers of pruned jobs are never given again
)

bodies = sa.Table(
    "bodies",
    metadata,
    _job_id(primary_key=True),
    sa.Column("kind", _enum(BodyKind), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Double, index=True),
    # Before `body`, see `Database.padding`.
    sa.Column("padding", sa.LargeBinary),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    _rising_id(),
    _job_id(),
    sa.Column("timestamp", sa.Double, nullable=False),
    sa.Column("level", Text, nullable=False),
    sa.Column("source", Text, nullable=False),
    sa.Column("message", Text, nullable=False),
    sa.Index(None, "job_id", "id"),
    sqlite_autoincrement=True,  # a reader's cursor never meets a number twice
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("owner", Text, primary_key=True),
    sa.Column("endpoint", Text, primary_key=True),
    sa.Column("key", Text, primary_key=True),
    sa.Column("body_hash", Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False, index=True),
    _job_id(),
    sa.Index(None, "job_id"),
)

webhooks = sa.Table(
    "webhooks",
    metadata,
    _rising_id(),
    _job_id(),
    sa.Column("url", Text, nullable=False),
    sa.Column("state", _enum(WebhookState), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("next_at", sa.Double, nullable=False),
    sa.Column("last_error", Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("finished_at", sa.Double),
    sa.Index(None, "state", "next_at"),
    sa.Index(None, "job_id", "state"),
    sqlite_autoincrement=True,
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("name", Text, nullable=False),
    sa.Column("sha256", Text, nullable=False, unique=True),
    sa.Column("scopes", Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("host", Text, nullable=False),
    sa.Column("device", Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("state", _enum(WorkerState), nullable=False),
    sa.Column("model_version", Text, nullable=False),
    sa.Column("lora_key", Text),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
)

# What changed, for the watchers of a SQLite file; PostgreSQL tells its watchers by NOTIFY.
hints = sa.Table(
    "hints",
    metadata,
    _rising_id(),
    sa.Column("topic", Text, nullable=False),
    sqlite_autoincrement=True,
)
