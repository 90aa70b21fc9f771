"""What jobs tell of themselves: their key, how long their files stay, why they failed, what they cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, kind in (
        ("key_id", sa.Text),
        ("files_expire_s", sa.Double),
        ("error_message", sa.Text),
        ("images", sa.SmallInteger),
        ("prompt_hit", sa.Boolean),
        ("reference_hit", sa.Boolean),
        ("merge_s", sa.Double),
    ):
        op.add_column("jobs", sa.Column(name, kind))
