"""Requests to orders, answers to objects."""

from __future__ import annotations

import json
from typing import Any

import pytest
from counting_market import DIGEST, MODEL, PROVIDERS, offer, roster

from pinaivu_gateway.errors import RequestRefused
from pinaivu_gateway.jobs import JobOrder
from pinaivu_gateway.network import models_of, node_of
from pinaivu_gateway.openai_schema import (
    ChatRequest,
    CompletionRequest,
    MaxPrice,
    parse_untrusted,
)
from pinaivu_gateway.reply import Reply
from pinaivu_gateway.translate import (
    Chance,
    Limits,
    chat_order,
    chat_turns,
    completion_order,
    context_window_of,
    price_ceiling,
    prompts_of,
)
from pinaivu_node.models.catalogue import CATALOGUE
from pinaivu_node.protocol.ids import MAX_SAFE_INTEGER, request_id_of
from pinaivu_node.protocol.market import JobKind, Preference

CHANCE = Chance(request_id_of(b"r" * 16), b"n" * 16, 77)
LIMITS = Limits(1024, 8192, 600_000, b"tenant", (b"f" * 16,))


def order(*messages: dict[str, Any], limits: Limits = LIMITS, **fields: Any) -> JobOrder:
    body = {"model": MODEL, "messages": messages or [user("Hi")], **fields}
    request = parse_untrusted(json.dumps(body).encode(), ChatRequest)
    return chat_order(request, chat_turns(request.messages), CHANCE, limits)


def raw(prompt: Any, **fields: Any) -> JobOrder:
    body = {"model": MODEL, "prompt": prompt, **fields}
    request = parse_untrusted(json.dumps(body).encode(), CompletionRequest)
    return completion_order(request, prompts_of(request)[0], CHANCE, LIMITS)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def turns(made: JobOrder) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in made.prompt.turns or ()]


def test_system_messages_are_merged_into_one_at_the_beginning():
    made = order(
        user("a"),
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": [{"type": "text", "text": "be "}, text("kind")]},
    )
    assert turns(made) == [("system", "be brief\n\nbe kind"), ("user", "a"), ("assistant", "b")]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_parts_are_joined_and_roles_kept():
    made = order(
        user([text("a"), text("b")]),
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
        {"role": "function", "content": "5", "name": "f"},
    )
    assert turns(made) == [("user", "ab"), ("assistant", "No."), ("tool", "4"), ("tool", "5")]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (user([text("a"), {"type": "image_url", "image_url": {}}]), "messages[1].content[1]"),
        (user([{"type": "input_audio"}]), "messages[1].content[0]"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "assistant", "content": "x", "function_call": {}}, "messages[1].function_call"),
    ],
)
def test_what_a_text_model_cannot_read_is_refused_where_it_stands(message, param):
    with pytest.raises(RequestRefused) as refused:
        order(user("a"), message)
    assert refused.value.problem.param == param


def test_more_text_than_fits_the_wire_is_refused():
    for make in (lambda: order(user("é" * 450_001)), lambda: raw("é" * 450_001)):
        with pytest.raises(RequestRefused) as refused:
            make()
        assert refused.value.problem.code == "string_above_max_length"
    order(user("é" * 450_000))


def test_no_prompt_of_this_text_can_have_more_tokens_than_the_limit():
    made = order(user("é" * 10), user("abc"))
    assert made.input_limit == 23 + 2 * 32 + 64
    assert made.input_estimate == 23 // 4 + 2 * 8 + 16
    assert raw([1, 2, 3]).input_limit == 3 + 64
    assert raw("abc").input_limit == 3 + 64


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 1024),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
    ],
)
def test_the_output_limit_is_the_clients_or_ours(fields, limit):
    made = order(**fields)
    assert made.output_limit == made.sampling.max_tokens == limit
    assert made.output_estimate == min(limit, 256)


@pytest.mark.parametrize("asked", [8192, 10**12])
def test_who_asks_for_the_whole_window_gets_what_the_prompt_leaves_of_it(asked):
    made = order(max_tokens=asked)
    assert made.output_limit == made.sampling.max_tokens == 8192 - made.input_estimate
    # A prompt beyond the window is the market's to refuse, in words that clients know.
    assert order(user("x" * 40_000), max_tokens=asked).output_limit == 1


def test_without_a_window_in_sight_the_wire_bounds_the_output():
    limits = Limits(1024, None, 600_000, b"")
    assert order(max_tokens=10**12, limits=limits).output_limit == 1_000_000


def test_a_raw_completion_has_openais_short_default():
    made = raw(["abc"])
    assert (made.kind, made.prompt.text, made.output_limit) == (JobKind.COMPLETION, "abc", 16)
    assert raw([[1, 2]]).prompt.token_ids == (1, 2)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_each_prompt_is_a_job(prompt, prompts):
    body = json.dumps({"model": MODEL, "prompt": prompt}).encode()
    assert prompts_of(parse_untrusted(body, CompletionRequest)) == prompts


def test_several_answers_are_sold_as_one_job():
    made = order(n=3, max_tokens=10)
    assert (made.sampling.n, made.sampling.max_tokens) == (3, 10)
    assert (made.output_limit, made.output_estimate) == (30, 30)
    assert order(n=128, max_tokens=8000).output_limit <= 1_000_000


def test_sampling_is_what_the_client_asked_for():
    made = order(
        temperature=0, top_p=1, top_k=-1, stop="x", logit_bias={"9": 1, "5": -100}, seed=3
    ).sampling
    assert (made.temperature, made.top_p, made.top_k, made.seed) == (0.0, 1.0, 0, 3)
    assert made.stop == ("x",)
    assert made.logit_bias == ((5, -100.0), (9, 1.0))
    assert order().sampling.seed == 77


def test_preferences_ride_along():
    peers = [each.peer_id for each in PROVIDERS]
    made = order(
        provider={
            "sort": "latency",
            "allow": peers,
            "deny": [peers[1]],
            "max_price": {"prompt": 0.1, "completion": "0.3"},
        }
    )
    assert (made.preference, made.allow, made.deny) == (
        Preference.LATENCY,
        tuple(peers),
        (peers[1],),
    )
    assert made.max_prices is not None
    assert made.max_prices.output == 300_000_000
    assert order().allow is None
    assert order(provider={"allow": []}).allow == ()


@pytest.mark.parametrize(
    ("amount", "nano"),
    [
        (0, 0),
        (0.1, 100_000_000),
        ("0.1", 100_000_000),
        (0.3, 300_000_000),
        (1e-9, 1),
        (1.9e-9, 1),
        (2.5e-10, 0),
        ("0.000000001", 1),
        (4503599.627370496, 4503599627370496),
        (1e300, MAX_SAFE_INTEGER),
        (10**30, MAX_SAFE_INTEGER),
    ],
)
def test_prices_are_whole_nano_x_and_never_above_what_was_written(amount, nano):
    ceiling = price_ceiling(MaxPrice(prompt=amount, completion=amount))
    assert ceiling.input == ceiling.cached_input == ceiling.output == nano


def test_the_fingerprint_names_what_ran_and_the_id_the_request():
    reply = Reply((CHANCE.request_id,), MODEL, 5, is_chat=True, model_digest=DIGEST)
    whole = reply.whole([], {})
    assert whole["system_fingerprint"] == "fp_" + DIGEST[7:19]
    assert whole["id"] == "chatcmpl-" + "72" * 16
    assert whole["object"] == "chat.completion"
    assert reply.head(chunk=True)["object"] == "chat.completion.chunk"
    raw_reply = Reply((CHANCE.request_id,), MODEL, 5, is_chat=False, model_digest=DIGEST)
    assert raw_reply.head(chunk=True)["object"] == "text_completion"


def test_models_are_added_up_over_providers():
    (model,) = models_of(roster(), created=5)
    assert model["id"] == MODEL
    assert (model["object"], model["created"], model["owned_by"]) == ("model", 5, "huggingface")
    assert (model["providers"], model["capacity"], model["context_window"]) == (2, 16, 8192)
    assert model["prices"]["output"] == {"min": 200_000_000, "max": 220_000_000}
    assert model["kinds"] == ["chat", "completion"]
    assert models_of((), created=5) == []


def test_a_node_is_shown_whole():
    node = node_of(roster()[0])
    assert node["peer"] == PROVIDERS[0].peer_id
    assert node["connected"] is True
    assert node["models"][0]["prices"]["input"] == 50_000_000
    json.dumps(node)


def test_the_window_is_the_widest_offered():
    assert context_window_of(roster(), MODEL) == 8192
    assert context_window_of(roster(), "other") is None
    assert offer(output=1, window=5).context_window == 5


def test_a_catalogue_name_stands_for_its_weights():
    """Nobody sells other weights under it; a name that the catalogue does not pin may be any."""
    assert order(model="smollm2:135m").model_digest == CATALOGUE["smollm2:135m"].digest
    assert order(model="qwen3:0.6b").model_digest is None
    assert order(model="my:own").model_digest is None
