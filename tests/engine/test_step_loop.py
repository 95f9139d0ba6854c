from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pinaivu_node.engine.batching import step_loop
from pinaivu_node.engine.chat.text import ByteDetokenizer
from pinaivu_node.engine.model.loading import LoadError, load
from pinaivu_node.engine.sampling.sampler import choose
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    PromptRefused,
)

sys.path.insert(0, str(Path(__file__).parent))
from solo import Solo, request

PROMPTS = [tuple(range(10, 10 + length)) for length in (1, 5, 40, 200)]


@pytest.fixture(scope="module")
def solo(tiny_model) -> Solo:
    return Solo(tiny_model, prefill_chunk=16)


@pytest.fixture(scope="module")
def reference(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_are_those_of_transformers_own_generate(solo, reference, prompt):
    wanted = reference.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    (said,) = solo.run(request(prompt))
    assert said.token_ids == wanted[0, len(prompt) :].tolist()
    assert said.last.input_tokens == len(prompt)


def test_logprobs_are_those_of_transformers_own_forward(solo, reference):
    (said,) = solo.run(request(PROMPTS[2], logprobs=5, temperature=1.0, seed=4))
    tokens = [*PROMPTS[2], *said.token_ids]
    with torch.inference_mode():
        logprobs = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for place, told in enumerate(said.logprobs):
        row = logprobs[len(PROMPTS[2]) + place - 1]
        assert told.chosen.token_id == said.token_ids[place]
        assert math.isclose(told.chosen.logprob, row[told.chosen.token_id], abs_tol=1e-4)
        assert [each.token_id for each in told.top] == row.topk(5).indices.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9},
                                      {"temperature": 1.5, "repetition_penalty": 1.3,
                                       "frequency_penalty": 0.5, "stop": ("q", "zz")}])  # fmt: skip
def test_an_answer_goes_on_elsewhere_from_its_own_tokens(solo, sampling):
    (whole,) = solo.run(request(PROMPTS[1], **sampling))
    pieces = []
    solo.loop._model.pool.forget()
    for at in range(len(whole.token_ids)):
        (rest,) = solo.run(request(PROMPTS[1], resume=whole.token_ids[:at], **sampling))
        assert whole.token_ids[:at] + rest.token_ids == whole.token_ids
        assert whole.text.endswith(rest.text)
        assert rest.finish is whole.finish
        assert rest.last.input_tokens == 5
        pieces.append(len(rest.text))
    assert pieces == sorted(pieces, reverse=True)


def test_the_same_seed_says_the_same_and_another_something_else(solo):
    texts = [solo.run(request(PROMPTS[1], temperature=1.0, seed=seed))[0].token_ids
             for seed in (1, 1, 2)]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_several_answers_to_one_prompt_differ_by_their_seeds_and_share_its_cache(solo):
    prompt = tuple(range(20, 200))
    solo.run(request(prompt, id="n", temperature=1.0, seed=5, n=3))
    answers = [solo.answers["n", index] for index in range(3)]
    assert len({tuple(said.token_ids) for said in answers}) == 3
    (first,) = solo.run(request(prompt, id="one", temperature=1.0, seed=5))
    assert first.token_ids == answers[0].token_ids
    assert [said.last.cached_tokens for said in answers] == [0, 128, 128]


def test_the_end_token_ends_the_answer_unless_it_is_ignored(solo):
    end = min(solo.model.eos_ids)
    (said,) = solo.run(request(PROMPTS[0], logit_bias={end: 100.0}))
    assert (said.token_ids, said.text, said.finish) == ([end], "", FinishReason.STOP)
    (said,) = solo.run(request(PROMPTS[0], logit_bias={end: 100.0}, ignore_eos=True, max_tokens=50))
    assert (len(said.token_ids), said.finish) == (50, FinishReason.LENGTH)


def test_a_stop_token_ends_the_answer(solo):
    (whole,) = solo.run(request(PROMPTS[2], ignore_eos=True))
    stop = whole.token_ids[6]
    (said,) = solo.run(request(PROMPTS[2], ignore_eos=True, stop_token_ids=(stop,)))
    assert said.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert said.finish is FinishReason.STOP


def test_the_answer_ends_where_the_context_window_does(solo):
    (said,) = solo.run(request(PROMPTS[3], max_tokens=1000, ignore_eos=True))
    assert len(said.token_ids) == 256 - 200
    assert said.finish is FinishReason.LENGTH


def test_a_stop_string_is_cut_and_its_tokens_are_counted(solo):
    (whole,) = solo.run(request(PROMPTS[2], ignore_eos=True))
    stop = whole.text[5:7]
    (said,) = solo.run(request(PROMPTS[2], ignore_eos=True, stop=(stop,)))
    assert said.text == whole.text[: whole.text.index(stop)]
    assert said.finish is FinishReason.STOP
    assert said.token_ids == whole.token_ids[: len(said.token_ids)]


def test_an_answer_of_no_tokens_is_over_at_once(solo):
    (said,) = solo.run(request(PROMPTS[1], max_tokens=0))
    assert (said.token_ids, said.finish) == ([], FinishReason.LENGTH)


def test_a_prompt_that_leaves_no_room_is_refused_in_the_words_that_clients_know(solo):
    solo.run(request(tuple([5] * 255)))
    with pytest.raises(
        PromptRefused,
        match=r"^This model's maximum context length is 256 tokens\. "
        r"However, your messages resulted in 256 tokens\.$",
    ):
        solo.run(request(tuple([5] * 256)))
    with pytest.raises(PromptRefused):
        solo.run(request(tuple([5] * 250), resume=[5] * 6))


def test_a_chat_is_counted_with_the_marks_of_its_template(solo):
    (said,) = solo.run(request((ChatMessage("user", "hi"),)))
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert said.last.input_tokens == len(solo.model.tokenizer(text)["input_ids"])


def test_a_cancelled_answer_ends_with_the_next_step_and_its_blocks_are_free(solo):
    from pinaivu_node.engine.frames import Cancel

    solo.ask(request(PROMPTS[2], id="gone", max_tokens=200, ignore_eos=True))
    for _ in range(6):
        solo.step()
    solo.inbox.put(Cancel("gone"))
    solo.step()
    assert solo.answers["gone", 0].finish is FinishReason.CANCELLED
    assert solo.model.pool.statistics(now=0.0).in_use == 0


def test_what_is_cancelled_while_it_is_prepared_never_runs(solo):
    from pinaivu_node.engine.frames import Cancel

    solo.preparing.add("early")
    solo.inbox.put(Cancel("early"))
    solo.ask(request(PROMPTS[2], id="early"))
    while solo.busy:
        solo.step()
    said = solo.answers["early", 0]
    assert (said.finish, said.token_ids) == (FinishReason.CANCELLED, [])


def test_the_deadline_ends_an_answer_with_an_error(solo):
    late = replace(request(PROMPTS[1], id="late"), deadline_ms=0)
    (said,) = solo.run(late)
    assert (said.finish, said.last.error) == (FinishReason.ERROR, "the deadline passed")


def test_a_long_prompt_leaves_those_who_stream_a_token_in_every_step(solo):
    solo.ask(request(PROMPTS[0], id="streams", max_tokens=60, ignore_eos=True))
    while not solo.answers["streams", 0].token_ids:
        solo.step()
    solo.model.pool.forget()
    solo.ask(request(PROMPTS[3], id="long", max_tokens=2))
    before = solo.steps
    while not solo.answers["long", 0].token_ids:
        told = len(solo.answers["streams", 0].token_ids)
        solo.step()
        assert len(solo.answers["streams", 0].token_ids) == told + 1
    assert solo.steps - before >= 200 / 16
    while solo.busy:
        solo.step()


def test_logits_that_are_no_numbers_end_that_answer_alone_and_are_not_kept(solo, monkeypatch):
    compute = solo.model.runner.compute

    def broken(chunks):
        logits = compute(chunks).clone()
        for row, chunk in enumerate(c for c in chunks if c.rows):
            if chunk.sequence.tokens[0] == 99:
                logits[row] = math.nan
        return logits

    monkeypatch.setattr(solo.model.runner.__class__, "compute", lambda _, chunks: broken(chunks))
    sick = request((99, *range(1, 80)), id="sick")
    answers = solo.run(sick, request(PROMPTS[1], id="well"))
    assert [said.finish for said in answers] == [FinishReason.ERROR, FinishReason.LENGTH]
    assert answers[0].last.error == "The model's logits are not numbers."
    monkeypatch.undo()
    (again,) = solo.run(request((99, *range(1, 80)), id="again"))
    assert again.last.cached_tokens == 0


def test_a_step_that_fails_ends_its_requests_and_the_loop_goes_on(solo, monkeypatch):
    def fails(_self, chunks):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(solo.model.runner.__class__, "compute", fails)
    (said,) = solo.run(request(PROMPTS[1], id="hit"))
    assert (said.finish, said.last.error) == (FinishReason.ERROR, "RuntimeError in a step")
    monkeypatch.undo()
    (said,) = solo.run(request(PROMPTS[1], id="after"))
    assert said.finish is FinishReason.LENGTH


def test_an_answer_that_cannot_be_read_ends_alone(solo, monkeypatch):
    mates = [request(prompt, id=f"mate {prompt}", logit_bias={77: -100.0}) for prompt in PROMPTS]
    alone = [solo.run(mate)[0].token_ids for mate in mates]
    push = ByteDetokenizer.push

    def stumbles(self, token_id):
        if token_id == 77:
            raise LookupError("a token from hell")
        return push(self, token_id)

    monkeypatch.setattr(ByteDetokenizer, "push", stumbles)
    sick = request(PROMPTS[0], id="sick", logit_bias={77: 100.0})
    said, *others = solo.run(sick, *mates)
    assert (said.finish, said.last.error) == (FinishReason.ERROR, "LookupError in what was said")
    assert [each.token_ids for each in others] == alone
    assert {each.finish for each in others} == {FinishReason.LENGTH}


def test_a_step_that_fails_midway_loses_no_end_of_an_answer(tiny_model, monkeypatch):
    """Guesses are drawn round by round; who ended in an earlier round has ended."""
    solo = Solo(tiny_model, speculate=4)
    drawn = set()

    def fails_later(logits, draws):
        if solo.steps in drawn:
            raise RuntimeError("the device is on fire")
        drawn.add(solo.steps)
        return choose(logits, draws)

    monkeypatch.setattr(step_loop, "choose", fails_later)
    long = request((5,) * 40, id="long", logit_bias={5: 100.0})
    short = request((9,), id="short", max_tokens=2)
    said, other = solo.run(long, short)
    assert (said.finish, said.last.error) == (FinishReason.ERROR, "RuntimeError in a step")
    assert other.finish is FinishReason.LENGTH
    assert solo.model.pool.statistics(now=0.0).in_use == 0


# --- one text, whatever happens around it ---------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory) -> Path:
    """A model with layers so wide that a product of a single row is summed in another order."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=1536, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=320,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def varied_requests():
    rng = random.Random(5)
    shared = tuple(rng.choices(range(200), k=130))
    return [
        request((7,), id="one token", temperature=1.0, seed=1, max_tokens=24),
        request(shared[:58], id="short", temperature=0.9, top_p=0.9, seed=2, max_tokens=20),
        request((*shared[:63], 9), id="greedy", max_tokens=20),
        request(shared[:115], id="penalised", temperature=1.2, repetition_penalty=1.2,
                presence_penalty=0.4, seed=3, max_tokens=20),
        request(shared[:120], id="long", temperature=1.0, min_p=0.02, seed=4, max_tokens=24),
        request((*shared[:124], 1, 2), id="longer", temperature=0.7, top_k=20, seed=5,
                max_tokens=12),
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "count"), [("float32", 200), ("bfloat16", 50)])
def test_whatever_the_schedule_it_is_one_text(wide_model, dtype, count):
    """Joins, leaves, cancels, preemptions, chunks and guesses of any size, resumes everywhere.

    In an engine with so little memory that its requests push each other out.
    """
    numbers = 5 * 64 * 2 * 2 * 2 * 16
    memory = numbers * (4 if dtype == "float32" else 2) / 2**30
    solo = Solo(wide_model, dtype=dtype, max_running=6, kv_cache_gb=memory, speculate=5)
    assert solo.model.pool.count == 5
    texts = {}
    for each in varied_requests():
        solo.model.pool.forget()
        (said,) = solo.run(each)
        texts[each.id] = said
    assert len({tuple(said.token_ids) for said in texts.values()}) == len(texts)
    preemptions = 0
    for seed in range(count):
        rng = random.Random(seed)
        before = solo.loop._scheduler.preemptions
        one_schedule(solo, rng, seed, texts)
        preemptions += solo.loop._scheduler.preemptions - before
    assert preemptions > count / 2


def one_schedule(solo: Solo, rng: random.Random, seed: int, texts) -> None:
    from pinaivu_node.engine.frames import Cancel
    from pinaivu_node.engine.types import GenerationRequest

    if rng.random() < 0.3:
        solo.model.pool.forget()
    waiting = []
    for number, each in enumerate(rng.choices(varied_requests(), k=6)):
        whole = texts[each.id].token_ids
        # Every position comes up over the schedules.
        at = (seed + number) % len(whole) if rng.random() < 0.6 else 0
        resumed = GenerationRequest(
            f"{seed}.{number}", each.prompt, each.sampling, resume_token_ids=tuple(whole[:at]),
            tenant=bytes([rng.randrange(2)]),
        )  # fmt: skip
        waiting.append((resumed, texts[each.id], at, rng.random() < 0.15))
    asked = []
    while waiting or solo.busy:
        while waiting and (rng.random() < 0.3 or not solo.busy):
            asked.append(waiting.pop())
            solo.ask(asked[-1][0])
        for resumed, _, _, cancels in asked:
            if cancels and rng.random() < 0.1 and solo.answers[resumed.id, 0].finish is None:
                solo.inbox.put(Cancel(resumed.id))
        solo.loop._pace.chunk = lambda decoding: rng.choice((1, 7, 16, 33, 200))
        solo.loop._speculate = rng.choice((0, 2, 5))
        solo.step()
    for resumed, whole, at, _ in asked:
        said = solo.answers[resumed.id, 0]
        if said.finish is FinishReason.CANCELLED:
            assert whole.token_ids[at:][: len(said.token_ids)] == said.token_ids
        else:
            assert (whole.token_ids[at:], whole.finish) == (said.token_ids, said.finish)
            assert whole.text.endswith(said.text)


def test_right_guesses_save_steps_and_change_nothing(tiny_model):
    said, steps = {}, {}
    for speculate in (0, 5):
        solo = Solo(tiny_model, context_window=512, speculate=speculate)
        # Mostly the same token for ever, now and then another one.
        drawn = {"temperature": 1.0, "logit_bias": {11: 52.0, 12: 50.0}, "ignore_eos": True}
        answers = solo.run(
            request((3, 1, 4), id="plain", max_tokens=100, seed=3, logprobs=2, **drawn),
            request((3, 1, 4), id="penalised", max_tokens=100, seed=4, frequency_penalty=0.3,
                    **drawn),
        )  # fmt: skip
        said[speculate] = [(each.token_ids, each.text, each.logprobs) for each in answers]
        steps[speculate] = solo.steps
        assert set(answers[0].token_ids) == {11, 12}
        assert solo.model.pool.statistics(now=0.0).in_use == 0
    assert said[0] == said[5]
    assert steps[5] < 0.7 * steps[0]


# --- what cannot be loaded ------------------------------------------------------------------------


def test_a_folder_that_is_no_model_says_so(tmp_path, tiny_model):
    from pinaivu_node.engine.config import EngineConfig

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="names no model_type"):
        load(EngineConfig(model=tmp_path), lambda progress, what: None)
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="no CUDA"):
            load(EngineConfig(model=tiny_model, device="cuda"), lambda progress, what: None)


def test_the_window_may_be_lowered(tiny_model):
    assert Solo(tiny_model, context_window=64).model.context_window == 64
