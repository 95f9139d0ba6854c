"""A gateway's HTTP side on a real socket, and ways to talk to it."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio
from counting_market import MODEL, CountingMarket

from pinaivu_gateway.app import serve_http, unix_clock
from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.http_server import bind
from pinaivu_gateway.keys import ApiKey, hash_of, key_of, prefix_of
from pinaivu_gateway.store import Store, open_store, sqlite_url

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count!"}]}


@dataclass
class Counter:
    """A served gateway."""

    url: str
    key: str
    market: CountingMarket
    store: Store
    database: str
    stop: trio.Event
    stopped: trio.Event

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def client(self, **changes: Any) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.root, headers=headers, timeout=10, **changes)

    async def chat(self, **fields: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json={**CHAT, **fields})

    async def send_raw(self, data: bytes) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        await stream.send_all(data)
        return stream

    async def ask_raw(self, body: object) -> trio.SocketStream:
        """A chat request on a connection whose answer is the caller's to read, or not."""
        data = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        return await self.send_raw(head.encode() + data)


def new_key(name: str = "test") -> tuple[str, ApiKey]:
    key = key_of(secrets.token_bytes(32))
    record = ApiKey(hash_of(key), prefix_of(key), name, secrets.token_bytes(32), unix_clock())
    return key, record


@contextlib.asynccontextmanager
async def open_counter(folder: Path, **config: Any) -> AsyncIterator[Counter]:
    url = sqlite_url(folder / "gateway.db")
    async with open_store(url) as store, trio.open_nursery() as nursery:
        key, record = new_key()
        await store.add_key(record)
        market, stop, stopped = CountingMarket(), trio.Event(), trio.Event()

        async def serve(task_status: Any) -> None:
            await serve_http(
                market,
                store,
                bind("127.0.0.1:0"),
                HttpConfig(**config),
                stop=stop,
                task_status=task_status,
            )
            stopped.set()

        base: str = await nursery.start(serve)
        yield Counter(base, key, market, store, url, stop, stopped)
        nursery.cancel_scope.cancel()


def events_of(body: bytes) -> list[Any]:
    """The events of a stream: JSON, or the text that is none."""
    found: list[Any] = []
    for block in body.decode().split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(json.loads(data) if data.startswith("{") else data)
    return found
