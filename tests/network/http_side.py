"""A gateway's HTTP side on a town's market, without a socket."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from town import MODEL, Town, clock, until
from warm_engine import WarmEngine

from pinaivu_gateway.app import gateway_app
from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.context import Gateway
from pinaivu_gateway.jobs import Market
from pinaivu_gateway.keyring import Keyring
from pinaivu_gateway.keys import ApiKey, hash_of, key_of, prefix_of
from pinaivu_gateway.metrics import Metrics
from pinaivu_gateway.store import open_store, run_inline, sqlite_url
from pinaivu_gateway.usage_log import UsageLog
from pinaivu_node.models.catalogue import CATALOGUE


async def opened(town: Town, engine: WarmEngine) -> Market:
    """A network of one provider, with the weights that the catalogue's name stands for."""
    await town.coordinator()
    await town.provider("a", engine=engine, digest=CATALOGUE[MODEL].digest)
    market = await town.gateway()
    await until(lambda: any(each.connected for each in market.providers()))
    return market


@asynccontextmanager
async def http_side(
    market: Market, folder: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """The gateway's HTTP side on this market, without a socket, and two keys for it."""
    async with open_store(sqlite_url(folder / "gateway.db"), run_sync=run_inline) as store:
        keys = []
        for number in range(2):
            key = key_of(bytes([number]) * 32)
            tenant = bytes([number + 1]) * 32
            await store.add_key(ApiKey(hash_of(key), prefix_of(key), "test", tenant, clock()))
            keys.append(key)
        usage = UsageLog(store)
        gateway = Gateway(
            market=market,
            keyring=Keyring(store),
            usage=usage,
            metrics=Metrics(market, None, usage),
            config=HttpConfig(),
            clock=clock,
            entropy=secrets.token_bytes,
            started_at=clock(),
        )
        transport = httpx.ASGITransport(gateway_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client, keys


async def said_over_http(
    client: httpx.AsyncClient, key: str, *contents: str, **fields: Any
) -> httpx.Response:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    response = await client.post(
        "/v1/chat/completions",
        headers={"authorization": f"Bearer {key}"},
        json={"model": MODEL, "messages": messages, "max_tokens": 20, **fields},
    )
    assert response.status_code == 200, response.text
    return response


def events_of(response: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
