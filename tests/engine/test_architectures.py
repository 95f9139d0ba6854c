"""Every family of models says what transformers' own classes say, or is refused with the reason."""

from __future__ import annotations

import pytest

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.loading import LoadError, load

from .architectures import REFUSED, SERVED, WINDOW, Architecture, make_folder
from .solo import Solo, request

FULL = ["full_attention"] * 4
TURNS = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
LONGROPE = {"original_max_position_embeddings": 96}
REASONS = {
    "gpt-oss": "sinks",
    "bloom": "off by",
    "mamba": "has no attention",
    "deepseek-v3": "does not know this architecture",
}
PROMPT = tuple((37 * place) % 256 for place in range(77))
LENGTH = 110
"""Past every sliding window several times, and past blocks and pages."""


def reference(folder, prompt, *, length):
    """What `generate` says, greedily, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        min_new_tokens=length,
    )
    return said[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=SERVED)
def folder(request, tmp_path_factory):
    return make_folder(SERVED[request.param], tmp_path_factory.mktemp(request.param))


def test_a_family_says_what_transformers_says_in_chunks_and_from_the_prefix_cache(folder):
    assert len(PROMPT) + LENGTH > 4 * WINDOW
    expected = reference(folder, PROMPT, length=LENGTH)
    greedy = {"max_tokens": LENGTH, "ignore_eos": True, "logit_bias": {257: -100.0}}
    solo = Solo(folder, prefill_chunk=16)
    [alone] = solo.run(request(PROMPT, id="alone", **greedy))
    assert alone.token_ids == expected
    assert alone.last.cached_tokens == 0
    # Again, from the cache, beside another that joins in the midst of it.
    longer = (*PROMPT, *expected[:20])
    again, mate = solo.run(
        request(PROMPT, id="again", **greedy),
        request(longer, id="mate", **greedy | {"max_tokens": LENGTH - 20}),
    )
    assert again.token_ids == expected
    assert again.last.cached_tokens > 0
    assert mate.token_ids == expected[20:]


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_would_be_computed_wrongly_is_refused(name, tmp_path):
    folder = make_folder(REFUSED[name], tmp_path)
    with pytest.raises(LoadError, match=REASONS[name]):
        load(EngineConfig(model=folder, device="cpu", threads=1), lambda _share, _what: None)


@pytest.mark.parametrize(
    ("architecture", "window"),
    [
        (Architecture("Cohere2Config", {"sliding_window": 200}), 200),
        (Architecture("Cohere2Config", {"sliding_window": 200, "layer_types": FULL}), 512),
        (Architecture("Starcoder2Config", {"sliding_window": 200}), 512),
        (Architecture("Phi3Config", LONGROPE | {"rope_parameters": TURNS}), 96),
    ],
)
def test_the_context_ends_where_nothing_checks_what_a_family_does(architecture, window, tmp_path):
    folder = make_folder(architecture, tmp_path)
    config = EngineConfig(model=folder, device="cpu", threads=1)
    assert load(config, lambda _share, _what: None).context_window == window
