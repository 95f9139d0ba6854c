"""The engine with the real model: what it says is what transformers itself says."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from real_models import installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
)
from pinaivu_node.models.store import InstalledModel

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name the primary colours, with an emoji for each.",
    "def fibonacci(n):",
)


@pytest.fixture(scope="module")
def smollm2() -> InstalledModel:
    return installed("smollm2:135m")


def chat(question: str, *, name="r", resume=(), **sampling) -> GenerationRequest:
    params = SamplingParams(**({"max_tokens": 32, "temperature": 0.0} | sampling))
    return GenerationRequest(name, (ChatMessage("user", question),), params, tuple(resume))


async def answer(engine, request):
    async with engine.generate(request) as events:
        return [event async for event in events]


def ids_of(events) -> list[int]:
    return [token for event in events for token in event.token_ids]


def reference(folder: Path) -> dict[str, list[int]]:
    """What `generate` says to each question, greedily, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
        )
        said = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        answers[question] = said[0, prompt["input_ids"].shape[1] :].tolist()
    return answers


async def test_greedy_answers_are_those_of_transformers_own_generate(smollm2):
    expected = reference(smollm2.folder)
    async with open_engine(EngineConfig(model=smollm2.folder, device="cpu")) as engine:
        await engine.wait_ready()
        for question in QUESTIONS:
            events = await answer(engine, chat(question))
            assert ids_of(events) == expected[question]
        paris = await answer(engine, chat(QUESTIONS[0]))
        assert "Paris" in "".join(event.text for event in paris)
        assert paris[-1].finish_reason is FinishReason.STOP


async def test_a_real_answer_is_taken_up_where_another_engine_left_it(smollm2):
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 24}
    config = EngineConfig(model=smollm2.folder, device="cpu")
    async with open_engine(config) as engine:
        await engine.wait_ready()
        whole = await answer(engine, chat(QUESTIONS[2], **sampling))
        for at in (1, 7, 20):
            begun = [event for event in whole if event.token_ids][:at]
            rest = await answer(engine, chat(QUESTIONS[2], resume=ids_of(begun), **sampling))
            assert ids_of(begun) + ids_of(rest) == ids_of(whole)
            texts = [event.text for event in [*begun, *rest]]
            assert "".join(texts) == "".join(event.text for event in whole)


async def test_a_long_prompt_does_not_count_as_a_hang_and_can_be_cancelled(smollm2):
    config = EngineConfig(
        model=smollm2.folder, device="cpu", prefill_chunk=64, hang_timeout_s=5, ping_interval_s=1
    )
    async with open_engine(config) as engine:
        await engine.wait_ready()
        with pytest.raises(PromptRefused, match="maximum context length is 8192 tokens"):
            await answer(engine, chat("word " * 9000))
        with trio.move_on_after(2):
            await answer(engine, chat("word " * 6000))
        with trio.fail_after(10):
            while engine.statistics().running:  # noqa: ASYNC110 - another process frees it
                await trio.sleep(0.01)
        assert engine.statistics().restarts == 0


async def test_a_base_model_continues_text_and_does_not_chat():
    gemma = installed("gemma3:270m")
    assert not gemma.chat
    async with open_engine(EngineConfig(model=gemma.folder, device="cpu")) as engine:
        await engine.wait_ready()
        with pytest.raises(PromptRefused, match="no chat template"):
            await answer(engine, chat("hi"))
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        events = await answer(engine, GenerationRequest("g", "The capital of France is", sampling))
        assert "France" in "".join(event.text for event in events)
