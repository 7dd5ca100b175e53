"""Alembic runs this script for each migration. The connection, and its transaction, are the caller's."""

from __future__ import annotations

from alembic import context

from agent.ledger.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite cannot alter most things in place: tables are copied, which PostgreSQL takes as well.
    render_as_batch=True,
    transaction_per_migration=False,
)
context.run_migrations()
