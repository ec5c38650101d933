"""Jobs that have not ended are found among many that have."""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision: str | None = "0009"


def upgrade() -> None:
    """Add the index."""
    op.create_index("ix_jobs_state_created_at_id", "jobs", ["state", "created_at", "id"])
