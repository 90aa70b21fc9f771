"""What the LoRAs of jobs cost: whether their set was merged already, and the time to fetch and read it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("lora_hit", sa.Boolean))
    op.add_column("jobs", sa.Column("lora_load_s", sa.Double))
