"""Vectors by the real encoder in its own process: those that transformers' own model gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from devnets import devnet
from real_models import installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import (
    ChatMessage,
    EmbeddingRequest,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
)
from pinaivu_node.models.catalogue import ModelKind
from pinaivu_node.models.store import InstalledModel

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

SENTENCES = (
    "The cat sits on the mat.",
    "A kitten is resting on a rug.",
    "Interest rates rose by half a percent.",
    "The central bank made borrowing more expensive.",
    "",
    "ok",
    "word " * 200,
    "Ünïcödé: 日本語, русский, 🦙",
)


@pytest.fixture(scope="module")
def minilm() -> InstalledModel:
    return installed("all-minilm:l6")


def reference(folder: Path) -> tuple[list[list[float]], int]:
    """The means of the tokens' states at unit length, as sentence-transformers; the tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    given = tokenizer(
        list(SENTENCES), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).tolist(), int(mask.sum())


def distance(a, b) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


async def test_vectors_are_those_of_sentence_transformers_whatever_they_are_batched_with(minilm):
    assert minilm.kind is ModelKind.EMBEDDING
    expected, tokens = reference(minilm.folder)
    async with open_engine(EngineConfig(model=minilm.folder, device="cpu")) as engine:
        await engine.wait_ready()
        assert engine.statistics().context_window == 256
        whole = await engine.embed(EmbeddingRequest("all", SENTENCES))
        assert whole.input_tokens == tokens
        for vector, known in zip(whole.vectors, expected, strict=True):
            assert len(vector) == 384
            assert abs(sum(x * x for x in vector) - 1) < 1e-6
            assert distance(vector, known) < 1e-5
        cat, kitten, rates, bank, *_ = whole.vectors
        assert distance(cat, kitten) < distance(cat, rates)
        assert distance(rates, bank) < distance(kitten, bank)

        # Twenty requests at once, in an order of their own: not a bit of difference.
        dice = random.Random(7)
        subsets = [dice.sample(range(len(SENTENCES)), dice.randint(1, 8)) for _ in range(20)]

        async def ask(number: int, chosen: list[int]) -> None:
            texts = tuple(SENTENCES[each] for each in chosen)
            said = await engine.embed(EmbeddingRequest(f"some-{number}", texts))
            assert said.vectors == tuple(whole.vectors[each] for each in chosen)

        async with trio.open_nursery() as nursery:
            for number, chosen in enumerate(subsets):
                nursery.start_soon(ask, number, chosen)


async def test_an_encoder_writes_no_text_and_says_which_input_is_too_long(minilm):
    async with open_engine(EngineConfig(model=minilm.folder, device="cpu")) as engine:
        await engine.wait_ready()
        chat = GenerationRequest("g", (ChatMessage("user", "hi"),), SamplingParams(max_tokens=8))
        with pytest.raises(PromptRefused, match="makes embeddings; it generates no text"):
            async with engine.generate(chat):
                pass
        with pytest.raises(PromptRefused, match=r"input 1 has \d+ tokens"):
            await engine.embed(EmbeddingRequest("long", ("short", "word " * 500)))
        with pytest.raises(PromptRefused, match="There is no token 99999"):
            await engine.embed(EmbeddingRequest("ids", ((101, 99999, 102),)))
        with trio.move_on_after(0.01):
            await engine.embed(EmbeddingRequest("left", ("word " * 200,) * 500))
        said = await engine.embed(EmbeddingRequest("after", ("still here",)))
        assert len(said.vectors[0]) == 384
        assert engine.statistics().restarts == 0


async def test_a_model_that_writes_text_makes_no_vectors():
    smollm2 = installed("smollm2:135m")
    async with open_engine(EngineConfig(model=smollm2.folder, device="cpu")) as engine:
        await engine.wait_ready()
        with pytest.raises(PromptRefused, match="it makes no embeddings"):
            await engine.embed(EmbeddingRequest("e", ("hello",)))


def test_a_node_announces_an_encoder_and_no_chat_is_sent_to_it(tmp_path):
    with devnet(tmp_path, "--providers", "1", "--model", "all-minilm:l6") as network:
        with network.http() as client:
            known = {each["id"]: each for each in client.get("/models").json()["data"]}
            assert known["all-minilm:l6"]["kinds"] == ["embedding"]
            body = {"model": "all-minilm:l6", "messages": [{"role": "user", "content": "hi"}]}
            answer = client.post("/chat/completions", json=body)
            assert 400 <= answer.status_code < 600
            assert "serves it for chat" in answer.json()["error"]["message"]
        assert network.nodes(), "the provider is still there"
