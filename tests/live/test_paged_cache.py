"""Real models over the cache of GPUs, on a CPU: the same texts as over the CPU's own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from real_models import installed

from pinaivu_node.engine.batching.blocks import BlockPool
from pinaivu_node.engine.model.cuda_cache import CudaKvCache
from pinaivu_node.engine.model.cuda_graphs import DecodeGraphs
from pinaivu_node.engine.model.runner import Runner

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from solo import Solo, request

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


def over_pages(model):
    """The model over pages of 256, with recordings that are made by calling."""
    cache = CudaKvCache(
        model.runner._cache._shape, pages=24, window=model.context_window, device=model.device
    )
    graphs = DecodeGraphs()
    graphs.record(
        model.runner._model, cache, counts=[1, 2, 4], recorder=lambda compute: compute,
        progress=lambda rows: None,
    )  # fmt: skip
    return replace(
        model,
        runner=Runner(model.runner._model, cache, graphs=graphs),
        pool=BlockPool(24, size=cache.page),
    )


@pytest.mark.parametrize("name", ["smollm2:135m", "gemma3:270m"])
def test_a_real_model_says_the_same_over_the_pages_of_a_gpu(name):
    folder = installed(name).folder
    # The second is longer than Gemma's window of 512.
    prompts = ["The capital of France is", "One after the other, " * 160, "Once upon a time"]
    wanted = [
        request(prompt, id=str(number), temperature=0.7 * number, seed=number, logprobs=0)
        for number, prompt in enumerate(prompts)
    ]
    config = {"context_window": 1024, "dtype": "float32", "prefill_chunk": 128}
    expected = Solo(folder, **config).run(*wanted)
    said = Solo(folder, adapt=over_pages, **config).run(*wanted)
    for ours, right in zip(said, expected, strict=True):
        assert ours.token_ids == right.token_ids
        worst = max(
            abs(a.chosen.logprob - b.chosen.logprob)
            for a, b in zip(ours.logprobs, right.logprobs, strict=True)
        )
        assert worst < 1e-3
    assert said[1].last.input_tokens > 512
