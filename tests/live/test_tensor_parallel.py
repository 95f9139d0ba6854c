"""A model shared by several processes: on CPUs here, as it would be on the GPUs of one machine."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
import trio
from real_models import installed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import EngineDead, GenerationRequest, SamplingParams

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="transformers would take the GPUs"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    """SmolLM2, whose nine heads and three KV heads are shared out among three."""
    return installed("smollm2:135m").folder


@pytest.fixture(scope="module")
def tiny(folder, tmp_path_factory) -> Path:
    """SmolLM2's tokenizer, and weights that are quick to load and mean nothing."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(made)
    AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    return made


@pytest.fixture
def config(tiny, tmp_path, monkeypatch) -> EngineConfig:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the processes find each other
    monkeypatch.setattr(tempfile, "tempdir", None)
    return EngineConfig(model=tiny, device="cpu", threads=1, tensor_parallel=2)


def some(prompt: str, *, name="r", tokens=12, **sampling) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=tokens, **sampling))


async def answer(engine, request) -> list[int]:
    with trio.fail_after(60):
        async with engine.generate(request) as events:
            return [token async for event in events for token in event.token_ids]


async def interrupted(engine, request, *, victim: int) -> None:
    async with engine.generate(request) as events:
        await anext(events)
        os.kill(victim, signal.SIGKILL)
        async for _ in events:
            pass


def followers_of(pid: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(pid).children()
        if any("follower" in word for word in process.cmdline())
    ]


async def are_gone(processes) -> bool:
    with trio.move_on_after(20):
        while any(process.is_running() for process in processes):  # noqa: ASYNC110 - not ours
            await trio.sleep(0.02)
        return True
    return False


async def test_three_processes_say_what_one_says(folder, config):
    config = config.model_copy(
        update={"model": folder, "context_window": 512, "tensor_parallel": 3}
    )
    requests = [
        some("The capital of France is", temperature=0.0),
        some("Once upon a time", temperature=0.9, seed=5, logprobs=1),
        some("word " * 200, temperature=0.0),
    ]
    async with open_engine(config.model_copy(update={"tensor_parallel": 1})) as engine:
        await engine.wait_ready()
        expected = [await answer(engine, each) for each in requests]
    async with open_engine(config) as engine:
        await engine.wait_ready()
        assert [await answer(engine, each) for each in requests] == expected
        assert len(followers_of(engine.pid)) == 2


async def test_when_one_dies_all_do_and_the_engine_comes_back(config, tmp_path):
    async with open_engine(config) as engine:
        await engine.wait_ready()
        followers = followers_of(engine.pid)
        request = some("Once upon a time", tokens=400, ignore_eos=True)
        # Whoever hears of it first says so: the one who waits for it, or the one who was told.
        with pytest.raises(EngineDead, match=r"was ended by signal 9|Connection (reset|closed)"):
            await interrupted(engine, request, victim=followers[0].pid)
        assert await are_gone(followers)
        await engine.wait_ready()
        assert len(await answer(engine, some("Once upon a time"))) == 12
        followers = followers_of(engine.pid)
        os.kill(engine.pid, signal.SIGKILL)
        assert await are_gone(followers)
    assert not list(tmp_path.glob("pinaivu-ranks-*"))


async def test_heads_that_cannot_be_shared_out_are_said_to_be_so(folder, config):
    async with open_engine(config.model_copy(update={"model": folder})) as engine:
        with pytest.raises(EngineDead, match="3 KV heads cannot be shared out among 2 GPUs"):
            await engine.wait_ready()
