from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.torch_model import LoadError, TorchModel
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
)

PROMPTS = [tuple(range(10, 10 + length)) for length in (1, 5, 40, 200)]


@pytest.fixture(scope="module")
def model(tiny_model) -> TorchModel:
    return TorchModel.load(EngineConfig(model=tiny_model, threads=1, prefill_chunk=16))


@pytest.fixture(scope="module")
def reference(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def request(prompt, *, resume=(), **sampling) -> GenerationRequest:
    params = SamplingParams(**({"max_tokens": 20, "temperature": 0.0} | sampling))
    return GenerationRequest("r", prompt, params, resume_token_ids=tuple(resume))


def run(model, prompt, **how):
    events = list(model.start(request(prompt, **how)).steps())
    token_ids = [token for event in events for token in event.token_ids]
    return token_ids, "".join(event.text for event in events), events[-1]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_are_those_of_transformers_own_generate(model, reference, prompt):
    wanted = reference.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    token_ids, text, last = run(model, prompt)
    assert token_ids == wanted[0, len(prompt) :].tolist()
    assert text == model.decode(token_ids)
    assert last.input_tokens == len(prompt)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9},
                                      {"temperature": 1.5, "repetition_penalty": 1.3,
                                       "frequency_penalty": 0.5, "stop": ("q", "zz")}])  # fmt: skip
def test_an_answer_goes_on_elsewhere_from_its_own_tokens(model, sampling):
    whole, text, last = run(model, PROMPTS[1], **sampling)
    for at in range(len(whole)):
        begun = list(model.start(request(PROMPTS[1], **sampling)).steps())[:at]
        rest, rest_text, rest_last = run(model, PROMPTS[1], resume=whole[:at], **sampling)
        assert whole[:at] + rest == whole
        assert "".join(event.text for event in begun) + rest_text == text
        assert rest_last.finish_reason is last.finish_reason
        assert rest_last.input_tokens == 5


def test_the_same_seed_says_the_same_and_another_something_else(model):
    texts = [run(model, PROMPTS[1], temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_end_token_ends_the_answer_unless_it_is_ignored(model):
    end = min(model.eos_ids)
    token_ids, text, last = run(model, PROMPTS[0], logit_bias={end: 1000.0})
    assert (token_ids, text, last.finish_reason) == ([end], "", FinishReason.STOP)
    token_ids, text, last = run(
        model, PROMPTS[0], logit_bias={end: 1000.0}, ignore_eos=True, max_tokens=50
    )
    assert (len(token_ids), text, last.finish_reason) == (50, "", FinishReason.LENGTH)


def test_the_answer_ends_where_the_context_window_does(model):
    token_ids, _, last = run(model, PROMPTS[3], max_tokens=1000, ignore_eos=True)
    assert len(token_ids) == 256 - 200
    assert last.finish_reason is FinishReason.LENGTH


def test_a_stop_string_is_cut_and_its_tokens_are_counted(model):
    token_ids, text, _ = run(model, PROMPTS[2], ignore_eos=True)
    stop = text[5:7]
    stopped_ids, stopped, last = run(model, PROMPTS[2], ignore_eos=True, stop=(stop,))
    assert stopped == text[: text.index(stop)]
    assert last.finish_reason is FinishReason.STOP
    assert stopped_ids == token_ids[: len(stopped_ids)]


def test_a_prompt_that_leaves_no_room_is_refused_in_the_words_that_clients_know(model):
    model.start(request(tuple([5] * 255)))
    with pytest.raises(
        PromptRefused,
        match=r"^This model's maximum context length is 256 tokens\. "
        r"However, your messages resulted in 256 tokens\.$",
    ):
        model.start(request(tuple([5] * 256)))
    with pytest.raises(PromptRefused):
        model.start(request(tuple([5] * 250), resume=[5] * 6))


def test_a_token_that_the_model_does_not_have_is_refused(model):
    for bad in (-1, model.vocabulary):
        with pytest.raises(PromptRefused, match="not in the model's vocabulary"):
            model.start(request((bad,)))
        with pytest.raises(PromptRefused, match="not in the model's vocabulary"):
            model.start(request((1,), resume=(bad,)))


def test_logprobs_are_refused_rather_than_left_out(model):
    with pytest.raises(PromptRefused):
        model.start(request((1,), logprobs=2))


def test_a_chat_is_counted_with_the_marks_of_its_template(model):
    generation = model.start(request((ChatMessage("user", "hi"),)))
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert generation.prompt_tokens == len(model.tokenizer(text)["input_ids"])


def test_a_broken_off_generation_shows_what_it_held_back(model):
    generation = model.start(request(PROMPTS[0]))
    generation.step()
    event = generation.ended(FinishReason.CANCELLED)
    assert event.token_ids == ()
    assert event.finish_reason is FinishReason.CANCELLED


def test_the_warm_up_measures(model):
    speed = model.warm_up()
    assert speed.tokens_per_second > 1
    assert speed.ttft_ms >= 0


def test_a_folder_that_is_no_model_says_so(tmp_path, tiny_model):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="cannot load"):
        TorchModel.load(EngineConfig(model=tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="no CUDA"):
            TorchModel.load(EngineConfig(model=tiny_model, device="cuda"))


def test_the_window_may_be_lowered(tiny_model):
    model = TorchModel.load(EngineConfig(model=tiny_model, context_window=64, threads=1))
    assert model.context_window == 64
