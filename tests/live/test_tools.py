"""Tools and the real models: asked in words, held to their schemas, read as they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_models import installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tool,
    ToolChoice,
    ToolUse,
)

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = Tool("get_weather", "The weather in a city.", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return installed("smollm2:135m").folder


def asked(choice, *, resume=(), **use) -> GenerationRequest:
    return GenerationRequest(
        "r",
        (ChatMessage("user", "What is the weather in Paris, in celsius?"),),
        SamplingParams(max_tokens=64, temperature=0.8, seed=5),
        resume_token_ids=tuple(resume),
        tools=ToolUse((WEATHER, Tool("time_now", "The time.")), choice, **use),
    )


async def answer(engine, request):
    async with engine.generate(request) as events:
        return [event async for event in events]


def ids_of(events):
    return [token for event in events for token in event.token_ids]


def calls_of(events):
    calls = {}
    for delta in (delta for event in events for delta in event.tool_calls):
        call = calls.setdefault(delta.index, [delta.id, delta.name, ""])
        call[2] += delta.arguments
    return calls


async def test_a_required_call_is_made_and_goes_on_elsewhere_from_any_token(smollm2):
    async with open_engine(EngineConfig(model=smollm2, device="cpu")) as engine:
        await engine.wait_ready()
        request = asked(ToolChoice.REQUIRED, named="get_weather", parallel=False)
        whole = await answer(engine, request)
        assert whole[-1].finish_reason is FinishReason.TOOL_CALLS
        assert "".join(event.text for event in whole) == ""
        [[call_id, name, arguments]] = calls_of(whole).values()
        assert call_id.startswith("call_")
        assert name == "get_weather"
        assert json.loads(arguments).keys() == {"city", "unit"}
        deltas = [delta for event in whole for delta in event.tool_calls]
        assert len(deltas) > 3, "the arguments come in pieces"
        begun = [event for event in whole if event.token_ids]
        for at in range(1, len(begun), 5):
            rest = await answer(
                engine,
                asked(
                    ToolChoice.REQUIRED,
                    resume=ids_of(begun[:at]),
                    named="get_weather",
                    parallel=False,
                ),
            )
            assert ids_of(begun[:at]) + ids_of(rest) == ids_of(whole)
            told = [delta for event in (*begun[:at], *rest) for delta in event.tool_calls]
            assert told == deltas


async def test_what_an_automatic_answer_calls_is_a_tool_there_is(smollm2):
    async with open_engine(EngineConfig(model=smollm2, device="cpu")) as engine:
        await engine.wait_ready()
        events = await answer(engine, asked(ToolChoice.AUTO))
        calls = calls_of(events)
        assert all(name in ("get_weather", "time_now") for _, name, _ in calls.values())
        assert calls or "".join(event.text for event in events)
        silent = await answer(engine, asked(ToolChoice.NONE))
        assert not calls_of(silent)
        assert silent[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
