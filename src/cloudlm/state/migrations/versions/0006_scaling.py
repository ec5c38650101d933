"""Demand in tokens and times, and how quick each version was measured to be."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision: str | None = "0005"
_MEASURES = (
    "prompt_tokens_per_s",
    "waiting_prompt_tokens",
    "finished_per_s",
    "output_tokens_per_s",
    "computed_tokens_per_s",
    "ttft_s",
    "tpot_s",
)


def upgrade() -> None:
    """Add the columns and the table; reports from before say nothing of tokens."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    for name in _MEASURES:
        op.add_column("demand", sa.Column(name, sa.Double(), nullable=False, server_default="0"))
    op.create_table(
        "paces",
        sa.Column("deployment", kind, nullable=False),
        sa.Column("model", kind, nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("deployment", "model", name="pk_paces"),
    )
