"""Tenants, projects, principals and roles; keys that speak for a principal."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"

_LIMITS = {
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "concurrent_streams": None,
    "spend_per_month": None,
}
_TENANT = {"title": "", "limits": _LIMITS, "created_at": 0.0}
_FIRST: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    ("tenants", {"name": "default"}, {**_TENANT, "disabled_at": None}),
    ("projects", {"tenant": "default", "name": "default"}, _TENANT),
    (
        "principals",
        {"id": "root"},
        {
            "name": "root",
            "kind": "service",
            "tenant": "default",
            "project": "default",
            "grants": [{"role": "owner", "scope": "*", "granted_by": ""}],
            "subject": "",
            "limits": _LIMITS,
            "created_at": 0.0,
            "disabled_at": None,
        },
    ),
)


def upgrade() -> None:
    """Build the tables with what every installation has, and give all keys to its root."""
    made = {
        name: op.create_table(
            name,
            *(_text(column) for column in columns),
            sa.Column("document", sa.Text, nullable=False),
            sa.PrimaryKeyConstraint(*columns, name=f"pk_{name}"),
        )
        for name, columns in (
            ("tenants", ("name",)),
            ("projects", ("tenant", "name")),
            ("principals", ("id",)),
            ("roles", ("scope", "name")),
        )
    }
    for name, key, rest in _FIRST:
        op.bulk_insert(made[name], [{**key, "document": json.dumps({**key, **rest})}])
    _tenants_of_old_keys(made["tenants"], made["projects"])
    for column, value in (("project", "default"), ("principal", "root"), ("scope", "default")):
        op.add_column("api_keys", _text(column, value))
    op.add_column("api_keys", _plain("models", '["*"]'))
    op.add_column("api_keys", _plain("limits", json.dumps(_LIMITS)))
    op.add_column("api_keys", sa.Column("expires_at", sa.Double, nullable=True))
    op.add_column("api_keys", _text("made_with", ""))
    op.add_column("api_keys", sa.Column("last_used_at", sa.Double, nullable=True))
    keys = sa.table("api_keys", *(sa.column(name) for name in ("role", "scope", "tenant")))
    op.execute(sa.update(keys).values(scope=keys.c.tenant))
    op.execute(sa.update(keys).where(keys.c.role == "admin").values(scope="*", role="owner"))
    op.create_index("ix_ledger_key_id_started_at", "ledger", ["key_id", "started_at"])


def _tenants_of_old_keys(tenants: sa.Table, projects: sa.Table) -> None:
    """Tenants were only words on keys: make them be there."""
    keys = sa.table("api_keys", sa.column("tenant"))
    found = op.get_bind().execute(sa.select(keys.c.tenant).distinct()).scalars().all()
    for name in sorted(set(found) - {"default"}):
        tenant = {"name": name, **_TENANT, "disabled_at": None}
        project = {"tenant": name, "name": "default", **_TENANT}
        op.bulk_insert(tenants, [{"name": name, "document": json.dumps(tenant)}])
        op.bulk_insert(
            projects, [{"tenant": name, "name": "default", "document": json.dumps(project)}]
        )


def _text(name: str, default: str | None = None) -> sa.Column[Any]:
    """Text sorted by code point, which SQLite does by itself."""
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, nullable=False, server_default=default)


def _plain(name: str, default: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False, server_default=default)
