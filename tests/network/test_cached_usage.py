"""What an OpenAI client is told of warm prompts, through HTTP and the whole network."""

from __future__ import annotations

import json

from http_side import events_of, http_side, opened, said_over_http
from town import Town, peer_of
from warm_engine import WarmEngine

from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import open_untrusted

LONG = "The sea is wide, and it was there before us. " * 40


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
        events = events_of(streamed)
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
