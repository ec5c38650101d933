"""Brings a database's tables to this cloudlm's form, one process at a time.

The check of an up-to-date database imports no alembic. Everything runs in one transaction, so a
process killed half-way leaves the database as it was. A database whose revision is unknown here
was written by a newer cloudlm and is refused.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from cloudlm.core.errors import StorageFailed
from cloudlm.state.migrations import HEAD, VERSION_TABLE
from cloudlm.state.tables import metadata

_LOCK_KEY = 0x636C6F75646C6D  # "cloudlm": the advisory lock of PostgreSQL
_stored = sa.table(VERSION_TABLE, sa.column("version_num"))


def stored_revision(connection: sa.Connection) -> str | None:
    """The revision that the database is at, None if it has no tables of ours."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sa.select(_stored.c.version_num)).scalar_one_or_none()


def migrate(connection: sa.Connection) -> None:
    """Upgrade in the connection's transaction, which must hold SQLite's write lock already.

    Raises StorageFailed if a newer cloudlm wrote the database.
    """
    if connection.dialect.name == "postgresql":
        # The caller limits the whole; one statement over a large table may take long.
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
    found = stored_revision(connection)
    if found == HEAD:  # another process was quicker
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StorageFailed(
            f"the state database has the tables of a newer cloudlm (revision {found[:40]!r}, this "
            f"one knows up to {HEAD!r}): upgrade cloudlm, or use another state.url"
        )
    if found is None:
        _check_empty(connection)
    command.upgrade(config, "head")


def _check_empty(connection: sa.Connection) -> None:
    """Raise StorageFailed if somebody else's tables have our names."""
    taken = set(sa.inspect(connection).get_table_names()) & set(metadata.tables)
    if taken:
        raise StorageFailed(
            f"the state database has a table {min(taken)!r} that cloudlm did not make: "
            "set state.url to a database of its own"
        )
