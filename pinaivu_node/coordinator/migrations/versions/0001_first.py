"""The first tables: accounts, entries, jobs, receipts, measurements, bans."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make every table."""
    _create_ledger()
    _create_jobs()
    _create_providers()


def _create_ledger() -> None:
    op.create_table(
        "accounts",
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.CheckConstraint("balance >= 0 OR name = 'treasury'", name="no_overdraft"),
    )
    op.create_table(
        "entries",
        sa.Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(160), nullable=False, unique=True),
        sa.Column("posted_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "postings",
        sa.Column("entry_id", sa.BigInteger, sa.ForeignKey("entries.id"), primary_key=True),
        sa.Column("account", sa.String(80), primary_key=True),
        sa.Column("amount", sa.BigInteger, nullable=False),
    )
    op.create_index("postings_by_account", "postings", ["account"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("request_id", sa.String(36), primary_key=True),
        sa.Column("gateway", sa.String(64), nullable=False),
        sa.Column("hold", sa.BigInteger, nullable=False),
        sa.Column("awarded_at", sa.BigInteger, nullable=False),
        sa.Column("settled_at", sa.BigInteger),
        sa.Column("award", sa.LargeBinary, nullable=False),
    )
    op.create_index(
        "open_jobs",
        "jobs",
        ["request_id"],
        sqlite_where=sa.text("settled_at IS NULL"),
        postgresql_where=sa.text("settled_at IS NULL"),
    )
    op.create_table(
        "bid_sets",
        sa.Column("request_id", sa.String(36), sa.ForeignKey("jobs.request_id"), primary_key=True),
        sa.Column("reply", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "receipts",
        sa.Column("request_id", sa.String(36), sa.ForeignKey("jobs.request_id"), primary_key=True),
        sa.Column(
            "entry_id", sa.BigInteger, sa.ForeignKey("entries.id"), nullable=False, unique=True
        ),
        sa.Column("reply", sa.LargeBinary, nullable=False),
    )


def _create_providers() -> None:
    averages = ("ttft", "speed", "reliability")
    op.create_table(
        "measurements",
        sa.Column("provider", sa.String(64), primary_key=True),
        sa.Column("model_digest", sa.String(71), primary_key=True),
        *(
            sa.Column(f"{name}_{part}", sa.BigInteger, nullable=False)
            for name in averages
            for part in ("mean", "weight")
        ),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "bans",
        sa.Column("peer", sa.String(64), primary_key=True),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(300), nullable=False),
    )
