"""The gateway's tables."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table

HEAD: Final = "0001"
"""The newest migration."""

metadata: Final = MetaData()

_ROW_NUMBER: Final = BigInteger().with_variant(Integer, "sqlite")
_REQUEST_ID: Final = String(36)

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("prefix", String(16), nullable=False, unique=True),
    Column("name", String(100), nullable=False),
    Column("tenant", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

deliveries: Final = Table(
    "deliveries",
    metadata,
    Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
    Column("request_id", _REQUEST_ID, nullable=False, unique=True),
    Column("envelope", LargeBinary, nullable=False),
)

usage: Final = Table(
    "usage",
    metadata,
    Column("request_id", _REQUEST_ID, primary_key=True),
    Column("key_prefix", String(16), nullable=False),
    Column("model", String(97), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("finish", String(24), nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("usage_by_key", "key_prefix", "at"),
)
