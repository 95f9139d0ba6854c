"""What an OpenAI client is told of warm prompts, through HTTP and the whole network."""

from __future__ import annotations

import json
import secrets
from contextlib import asynccontextmanager

import httpx
from town import MODEL, Town, clock, peer_of, until
from warm_engine import WarmEngine

from pinaivu_gateway.app import gateway_app
from pinaivu_gateway.config import HttpConfig
from pinaivu_gateway.context import Gateway
from pinaivu_gateway.keyring import Keyring
from pinaivu_gateway.keys import ApiKey, hash_of, key_of, prefix_of
from pinaivu_gateway.metrics import Metrics
from pinaivu_gateway.store import open_store, run_inline, sqlite_url
from pinaivu_gateway.usage_log import UsageLog
from pinaivu_node.models.catalogue import CATALOGUE
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import open_untrusted

LONG = "The sea is wide, and it was there before us. " * 40


async def opened(town: Town, engine: WarmEngine):
    """A network of one provider, with the weights that the catalogue's name stands for."""
    await town.coordinator()
    await town.provider("a", engine=engine, digest=CATALOGUE[MODEL].digest)
    market = await town.gateway()
    await until(lambda: any(each.connected for each in market.providers()))
    return market


@asynccontextmanager
async def http_side(market, folder):
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


async def said_over_http(client, key, *contents, **fields) -> httpx.Response:
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


def cached_tokens(usage) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


async def test_an_openai_client_sees_what_was_cached_streamed_or_not(
    town: Town, tmp_path, autojump_clock
) -> None:
    engine = WarmEngine()
    market = await opened(town, engine)
    async with http_side(market, tmp_path) as (client, (key, _)):
        first = (await said_over_http(client, key, LONG)).json()
        assert cached_tokens(first["usage"]) == 0
        turns = (LONG, first["choices"][0]["message"]["content"], "And the mountains?")
        streamed = await said_over_http(
            client, key, *turns, stream=True, stream_options={"include_usage": True}
        )
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        usage = json.loads(events[-2])["usage"]
        assert events[-1] == "[DONE]"
        assert 0.9 * len(LONG) < cached_tokens(usage) < usage["prompt_tokens"]
        again = (await said_over_http(client, key, *turns)).json()
        assert cached_tokens(again["usage"]) > 0.9 * len(LONG)
        metrics = (await client.get("/metrics")).text
    counted = cached_tokens(usage) + cached_tokens(again["usage"])
    assert f'pinaivu_gateway_tokens_total{{kind="cached"}} {float(counted)}' in metrics


async def test_each_key_has_its_own_tenant_and_its_own_fingerprints(
    town: Town, tmp_path, autojump_clock
) -> None:
    engine = WarmEngine()
    market = await opened(town, engine)
    async with http_side(market, tmp_path) as (client, keys):
        for key in keys:
            answer = (await said_over_http(client, key, LONG)).json()
            assert cached_tokens(answer["usage"]) == 0
            reply = await market.receipt(answer["request_id"], wait_ms=20_000)
            receipt = open_untrusted(reply.receipt, Receipt, signer=peer_of("coordinator"))
            [segment] = receipt.segments
            assert segment.usage.cached_input == 0  # nor did the bid claim any
    assert [request.tenant for request in engine.asked] == [b"\x01" * 32, b"\x02" * 32]
