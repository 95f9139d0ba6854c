"""The tables, as the newest migration leaves them.

Names of peers and requests are text, money and moments are 64-bit integers, what was signed is
kept byte for byte.  Rows of `entries`, `postings`, `bid_sets` and `receipts` are only ever
inserted.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)

HEAD: Final = "0001"
"""The newest migration; a database that has it is opened without loading the migrations."""

metadata: Final = MetaData()
# SQLite numbers rows by itself only where the column is spelt INTEGER.
_RowNumber: Final = BigInteger().with_variant(Integer, "sqlite")
_REQUEST_ID: Final = String(36)
_PEER: Final = String(64)

accounts: Final = Table(
    "accounts",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("balance", BigInteger, nullable=False),
    CheckConstraint("balance >= 0 OR name = 'treasury'", name="no_overdraft"),
)

entries: Final = Table(
    "entries",
    metadata,
    Column("id", _RowNumber, primary_key=True, autoincrement=True),
    Column("key", String(160), nullable=False, unique=True),
    Column("posted_at", BigInteger, nullable=False),
)

postings: Final = Table(
    "postings",
    metadata,
    Column("entry_id", BigInteger, ForeignKey("entries.id"), primary_key=True),
    Column("account", String(80), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    Index("postings_by_account", "account"),
)

jobs: Final = Table(
    "jobs",
    metadata,
    Column("request_id", _REQUEST_ID, primary_key=True),
    Column("gateway", _PEER, nullable=False),
    Column("hold", BigInteger, nullable=False),
    Column("awarded_at", BigInteger, nullable=False),
    Column("settled_at", BigInteger),
    Column("award", LargeBinary, nullable=False),
    Index(
        "open_jobs",
        "request_id",
        sqlite_where=text("settled_at IS NULL"),
        postgresql_where=text("settled_at IS NULL"),
    ),
)

bid_sets: Final = Table(
    "bid_sets",
    metadata,
    Column("request_id", _REQUEST_ID, ForeignKey("jobs.request_id"), primary_key=True),
    Column("reply", LargeBinary, nullable=False),
)

receipts: Final = Table(
    "receipts",
    metadata,
    Column("request_id", _REQUEST_ID, ForeignKey("jobs.request_id"), primary_key=True),
    Column("entry_id", BigInteger, ForeignKey("entries.id"), nullable=False, unique=True),
    Column("reply", LargeBinary, nullable=False),
)

measurements: Final = Table(
    "measurements",
    metadata,
    Column("provider", _PEER, primary_key=True),
    Column("model_digest", String(71), primary_key=True),
    Column("ttft_mean", BigInteger, nullable=False),
    Column("ttft_weight", BigInteger, nullable=False),
    Column("speed_mean", BigInteger, nullable=False),
    Column("speed_weight", BigInteger, nullable=False),
    Column("reliability_mean", BigInteger, nullable=False),
    Column("reliability_weight", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

bans: Final = Table(
    "bans",
    metadata,
    Column("peer", _PEER, primary_key=True),
    Column("until", BigInteger, nullable=False),
    Column("reason", String(300), nullable=False),
)
