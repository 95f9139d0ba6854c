"""Runs the migrations on the connection that the store has opened."""

from __future__ import annotations

from alembic import context

from pinaivu_gateway.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by making it anew
)
with context.begin_transaction():
    context.run_migrations()
