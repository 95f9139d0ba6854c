"""What int8 costs real models in accuracy, on prose that is in nobody's copyright."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import trio
from torch.nn.functional import cross_entropy

from pinaivu_node.engine.batching.scheduler import Chunk
from pinaivu_node.engine.batching.sequence import Sequence
from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.loading import load

sys.path.insert(0, str(Path(__file__).parent))
from test_engine import answer, chat, installed

pytestmark = pytest.mark.live
# Lewis Carroll, Alice's Adventures in Wonderland (1865); Herman Melville, Moby-Dick (1851).
PROSE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing
to do: once or twice she had peeped into the book her sister was reading, but it had no pictures
or conversations in it, "and what is the use of a book," thought Alice "without pictures or
conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way
to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all
seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, and
looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind that
she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it,
and burning with curiosity, she ran across the field after it, and fortunately was just in time to
see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get
out again.

Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and
see the watery part of the world. It is a way I have of driving off the spleen and regulating the
circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly
November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping
into the street, and methodically knocking people's hats off - then, I account it high time to get
to sea as soon as I can.
"""


@torch.inference_mode()
def logits_of(folder: Path, **config) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of the prose; and the tokens."""
    settings = EngineConfig(model=folder, device="cpu", threads=1, kv_cache_gb=0.3, **config)
    model = load(settings, lambda progress, what: None)
    paragraphs = [" ".join(each.split()) for each in PROSE.split("\n\n")]
    tokens = model.tokenizer("\n\n".join(paragraphs)).input_ids
    sequence = Sequence(tokens[:1])
    sequence.blocks = model.pool.take(-(-len(tokens) // model.pool.size))
    # Logits are made of a guess's every token; so the rest of the prose is one.
    chunk = Chunk(sequence, 0, 1, guess=tuple(tokens[1:]))
    return model.runner.compute([chunk]), torch.tensor(tokens)


@pytest.mark.parametrize("name", ["smollm2:135m", "gemma3:270m"])
def test_prose_is_as_likely_as_before_and_the_next_token_most_often_the_same(name):
    folder = installed(name).folder
    exact, tokens = logits_of(folder)
    quantised, _ = logits_of(folder, quantization="int8")
    perplexity, after = (
        float(cross_entropy(logits[:-1], tokens[1:]).exp()) for logits in (exact, quantised)
    )
    agreement = float((exact.argmax(-1) == quantised.argmax(-1)).float().mean())
    error = float((quantised - exact).square().mean().sqrt() / exact.std())
    divergence = float(
        (exact.softmax(-1) * (exact.log_softmax(-1) - quantised.log_softmax(-1))).sum(-1).mean()
    )
    print(  # noqa: T201 - the figures are half of what this test is for
        f"{name}: {len(tokens)} tokens, perplexity {perplexity:.2f} → {after:.2f}, same next "
        f"token {agreement:.3f}, logits off by {error:.3f}, divergence {divergence:.4f}"
    )
    assert after < 1.01 * perplexity
    assert agreement > 0.94
    assert error < 0.08
    assert divergence < 0.01


async def test_a_model_in_int8_answers_from_its_own_process():
    smollm2 = installed("smollm2:135m")
    config = EngineConfig(model=smollm2.folder, device="cpu", quantization="int8")
    async with open_engine(config) as engine:
        with trio.fail_after(120):
            await engine.wait_ready()
        events = await answer(engine, chat("What is the capital of France?"))
        assert "Paris" in "".join(event.text for event in events)
