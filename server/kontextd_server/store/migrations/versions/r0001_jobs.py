"""The first tables: jobs with their payloads and logs, webhooks, keys, workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

RISING = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    _jobs()
    _what_belongs_to_jobs()
    _webhooks()
    _keys_workers_and_hints()


def _job_id(primary_key: bool = False) -> sa.Column[int]:
    return sa.Column(
        "job_id", sa.BigInteger, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=primary_key, nullable=False
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", RISING, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False, unique=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("lora_key", sa.Text, nullable=False),
        sa.Column("runner_hint", sa.Text),
        sa.Column("transient", sa.Boolean, nullable=False),
        sa.Column("tags", sa.Text),
        sa.Column("webhook_url", sa.Text),
        sa.Column("base_url", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("start_by", sa.Double),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("runs_allowed", sa.Integer, nullable=False),
        sa.Column("runs_left", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", sa.Double),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("steps_done", sa.Integer),
        sa.Column("steps_total", sa.Integer),
        sa.Column("error_type", sa.Text),
        sa.Column("http_status", sa.SmallInteger),
        sa.Column("inference_s", sa.Double),
        sa.CheckConstraint("(state = 'COMPLETED') = (outcome IS NOT NULL)", name="completed_has_an_outcome"),
        sa.CheckConstraint("(state = 'IN_PROGRESS') = (lease_until IS NOT NULL)", name="running_has_a_lease"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_state_priority_id", "jobs", ["state", "priority", "id"])
    op.create_index("ix_jobs_owner_state", "jobs", ["owner", "state"])
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])


def _what_belongs_to_jobs() -> None:
    op.create_table(
        "bodies",
        _job_id(primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("padding", sa.LargeBinary),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_bodies_expires_at", "bodies", ["expires_at"])
    op.create_table(
        "events",
        sa.Column("id", RISING, primary_key=True),
        _job_id(),
        sa.Column("timestamp", sa.Double, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"])
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("endpoint", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("body_hash", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        _job_id(),
    )
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"])
    op.create_index("ix_idempotency_keys_job_id", "idempotency_keys", ["job_id"])


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", RISING, primary_key=True),
        _job_id(),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Double, nullable=False),
        sa.Column("last_error", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhooks_state_next_at", "webhooks", ["state", "next_at"])
    op.create_index("ix_webhooks_job_id_state", "webhooks", ["job_id", "state"])


def _keys_workers_and_hints() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model_version", sa.Text, nullable=False),
        sa.Column("lora_key", sa.Text),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.create_table(
        "hints",
        sa.Column("id", RISING, primary_key=True),
        sa.Column("topic", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
