"""The tables' history, oldest first, for alembic. ``state.migrate`` runs it.

A change of the tables is a new file in ``versions`` whose ``down_revision`` is the last one, and
``HEAD`` below. Files of a released version never change.
"""

HEAD = "0010"
"""The newest revision, known without importing alembic."""

VERSION_TABLE = "schema_version"
"""Where a database's own revision is written."""
