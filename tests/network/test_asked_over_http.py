"""Logprobs and response formats, as an OpenAI client asks for them, through the whole network."""

from __future__ import annotations

import json

import pytest
from http_side import events_of, http_side, opened, said_over_http
from town import Town
from warm_engine import WarmEngine

from pinaivu_node.engine.types import Constraint, ConstraintKind

SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}}, "required": ["ü"]}


async def test_a_client_is_told_how_likely_each_token_was(
    town: Town, tmp_path, autojump_clock
) -> None:
    market = await opened(town, WarmEngine())
    asked = {"logprobs": True, "top_logprobs": 2}
    async with http_side(market, tmp_path) as (client, (key, _)):
        whole = (await said_over_http(client, key, "Hello", **asked)).json()
        streamed = events_of(await said_over_http(client, key, "Hello", stream=True, **asked))
        plain = (await said_over_http(client, key, "Hello")).json()
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert len(logprobs["content"]) == whole["usage"]["completion_tokens"] == 20
    first = logprobs["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("x", -0.5, [120])
    assert [other["logprob"] for other in first["top_logprobs"]] == [-1.0, -2.0]
    chunks = [json.loads(each)["choices"][0]["logprobs"] for each in streamed[:-1]]
    assert sum(len(each["content"]) for each in chunks if each) == 20
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("wanted", "constraint"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint(ConstraintKind.JSON_OBJECT)),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            Constraint(
                ConstraintKind.JSON_SCHEMA,
                json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")),
            ),
        ),
    ],
)
async def test_a_response_format_reaches_the_engine(
    town: Town, tmp_path, autojump_clock, wanted, constraint
) -> None:
    engine = WarmEngine()
    market = await opened(town, engine)
    async with http_side(market, tmp_path) as (client, (key, _)):
        await said_over_http(client, key, "Hello", response_format=wanted)
    [request] = engine.asked
    assert request.constraint == constraint
