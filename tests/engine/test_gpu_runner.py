"""Steps on a GPU, as far as a CPU can tell: recordings, memory, and numbers that stay there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from pinaivu_node.engine.model import attention
from pinaivu_node.engine.model.cpu_cache import KvShape
from pinaivu_node.engine.model.cuda_cache import CudaKvCache
from pinaivu_node.engine.model.cuda_graphs import DecodeBuffers, DecodeGraphs, row_counts
from pinaivu_node.engine.model.gpu_memory import Memory, pages_that_fit
from pinaivu_node.engine.model.gpu_runner import largest_step, looks_at_positions
from pinaivu_node.engine.model.paged_attention import flash, torch_has_paged_flash
from pinaivu_node.engine.model.runner import Runner
from pinaivu_node.engine.model.step import Step
from pinaivu_node.engine.model.weights import LoadError
from pinaivu_node.engine.sampling.sampler import Draw, SequenceSampling, choose
from pinaivu_node.engine.types import FinishReason, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from solo import Solo, request

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = KvShape(1, 2, 16, torch.float32)
GIB = 2**30


# --- a device whose numbers nobody can see --------------------------------------------------------


def unseen(model_class, config, *, kv_heads: int) -> Runner:
    """On torch's meta device: sizes, types and devices are checked as on a GPU, and to ask for a
    number is an error where a GPU would make the CPU wait.
    """
    attention.register()
    model = model_class(config).eval().to("meta", torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    shape = KvShape(config.num_hidden_layers, kv_heads, 64, torch.bfloat16)
    cache = CudaKvCache(shape, pages=8, window=1024, device=META, attention=flash)
    graphs = DecodeGraphs()
    graphs.record(
        model, cache, counts=[1, 2], recorder=lambda compute: compute, progress=lambda rows: None
    )
    return Runner(model, cache, graphs=graphs)


@pytest.mark.skipif(not torch_has_paged_flash(), reason="this torch has no FlashAttention of pages")
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_gpu_computes_a_step_without_being_asked_for_a_number(family):
    sizes = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4,
        "head_dim": 64, "max_position_embeddings": 1024,
    }  # fmt: skip
    if family == "llama":
        config = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2)
        runner = unseen(LlamaForCausalLM, config, kv_heads=2)
    else:  # with layers that see a window
        config = Gemma3TextConfig(**sizes, num_hidden_layers=7, num_key_value_heads=1)
        runner = unseen(Gemma3ForCausalLM, config, kv_heads=1)
    mixed = Step([1, 2, 3, 4], [2, 3], [(0, 3, 0, 0), (3, 1, 300, 1)], [[0, 0], [1, 2]])
    decode = Step([1, 2], [0, 1], [(0, 1, 0, 0), (1, 1, 300, 1)], [[0, 0], [1, 2]])
    for step in (mixed, decode):
        logits = runner.forward(step)
        assert (logits.shape, logits.dtype, logits.device) == ((2, 64), torch.float32, META)


def test_a_gpu_draws_without_being_asked_for_a_number_before_all_are_drawn():
    params = SamplingParams(
        max_tokens=1, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, logprobs=5,
        logit_bias={0: 1.0}, frequency_penalty=0.5,
    )  # fmt: skip
    state = SequenceSampling(params, seed=0, prompt=(1,), answer=(2,), vocabulary=64, device=META)
    allowed = torch.full((2,), -1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor") as stopped:
        choose(torch.empty(3, 64, device=META), [Draw(state, 0, allowed)] * 3)
    assert stopped.traceback[-1].name == "draw"
    assert "torch.cat([out_whole" in str(stopped.traceback[-1].statement)


# --- recordings -----------------------------------------------------------------------------------


def test_recordings_are_for_powers_of_two_up_to_what_may_run_at_once():
    assert row_counts(1) == [1]
    assert row_counts(48) == [1, 2, 4, 8, 16, 32, 64]
    assert row_counts(64) == [1, 2, 4, 8, 16, 32, 64]
    assert row_counts(5000)[-1] == 512


def test_buffers_hold_the_step_and_send_what_is_left_over_to_the_spare_page():
    cache = CudaKvCache(SHAPE, pages=8, window=64, device=CPU, page=16)
    buffers = DecodeBuffers(cache, 4)
    before = buffers.tokens.data_ptr()
    buffers.fill(Step([5, 6], [0, 1], [(0, 1, 17, 0), (1, 1, 3, 1)], [[2, 7], [4, 0]]))
    place = buffers.batch.place
    assert buffers.tokens.data_ptr() == before
    assert buffers.tokens.tolist() == [5, 6, 0, 0]
    assert buffers.positions.tolist() == [17, 3, 0, 0]
    assert place.slots.tolist() == [7 * 16 + 1, 4 * 16 + 3, 8 * 16, 8 * 16]
    assert place.lengths.tolist() == [18, 4, 1, 1]
    assert place.tables[:, :2].tolist() == [[2, 7], [4, 0], [8, 0], [8, 0]]
    assert place.tables.shape == (4, 4)
    assert place.starts.tolist() == [0, 1, 2, 3, 4]


def test_only_steps_of_next_tokens_that_are_small_enough_are_replayed(tiny_model):
    replayed = []
    solo = Solo(tiny_model)
    cache = CudaKvCache(
        KvShape(2, 2, 8, torch.float32), pages=8, window=256, device=CPU, page=16
    )  # fmt: skip

    def recorder(compute):
        def replay():
            logits = compute()
            replayed.append(len(logits))
            return logits

        return replay

    graphs, told = DecodeGraphs(), []
    graphs.record(
        solo.model.runner._model, cache, counts=[1, 2, 4], recorder=recorder, progress=told.append
    )
    assert told == [4, 2, 1]

    def step(rows):
        chunks = [(row, 1, 0, row) for row in range(rows)]
        return Step([5] * rows, list(range(rows)), chunks, [[row] for row in range(rows)])

    for rows in (1, 2, 3, 4):
        assert graphs.replay(step(rows)).shape == (rows, solo.model.vocabulary)
    assert replayed == [1, 2, 4, 4]
    assert graphs.replay(step(5)) is None
    assert graphs.replay(Step([5, 6], [1], [(0, 2, 0, 0)], [[0]])) is None
    assert graphs.replay(replace(step(1), last=[])) is None


@pytest.mark.parametrize(
    ("rope", "asks"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, False),
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, True),
    ],
)
def test_models_whose_rotation_depends_on_the_longest_of_a_step_are_not_recorded(rope, asks):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    assert looks_at_positions(LlamaForCausalLM(config)) == asks


# --- what a step is, in numbers -------------------------------------------------------------------


def test_a_step_arrives_in_another_process_as_it_left():
    step = Step([5, 6, 7], [1, 2], [(0, 2, 30, 0), (2, 1, 0, 1)], [[4, 2, 9], [1, 0, 0]])
    assert Step.unpack(step.pack()) == step
    assert step.positions == [30, 31, 0]
    nothing_drawn = Step([5], [], [(0, 1, 0, 0)], [[0]])
    assert Step.unpack(nothing_drawn.pack()) == nothing_drawn


@pytest.mark.parametrize("window", [16, 100, 5000])
def test_the_largest_step_fits_pages_of_its_own(window):
    step = largest_step(prompt=512, rows=64, window=window, page=16)
    assert len(step.tokens) == len(step.positions) == 576
    assert len(step.last) == 64
    assert max(step.positions) < window
    used = [page for table, (_, count, _, _) in zip(step.tables, step.chunks, strict=True)
            for page in table[: -(-count // 16)]]  # fmt: skip
    assert used == list(range(len(used)))


# --- memory ---------------------------------------------------------------------------------------


def test_pages_are_what_the_fraction_leaves_beside_weights_and_work():
    memory = Memory(total=80 * GIB, used=16 * GIB, work=2 * GIB)
    assert pages_that_fit(memory, fraction=0.9, page_bytes=GIB) == 53
    assert pages_that_fit(memory, fraction=0.9, page_bytes=GIB, kv_cache_gb=10) == 9


def test_where_nothing_is_left_the_operator_hears_what_takes_how_much():
    memory = Memory(total=24 * GIB, used=20 * GIB, work=2 * GIB)
    with pytest.raises(LoadError, match=r"24\.0 GiB.*0\.9 allows 21\.6, 20\.0 are in use.*2\.0"):
        pages_that_fit(memory, fraction=0.9, page_bytes=GIB)
    with pytest.raises(LoadError, match="kv_cache_gb 1"):
        pages_that_fit(memory, fraction=0.9, page_bytes=GIB, kv_cache_gb=1)


# --- errors ---------------------------------------------------------------------------------------


def test_a_gpu_that_was_refused_memory_goes_on_and_after_any_other_error_does_not(tiny_model):
    class OnGpu:
        device = torch.device("cuda")

    runner = Runner(OnGpu(), Solo(tiny_model).model.runner._cache)
    assert runner.survives(torch.OutOfMemoryError("refused"))
    assert not runner.survives(RuntimeError("CUDA error: an illegal memory access"))


class SmallGpu:
    """A runner that is refused memory for steps of more than so many tokens."""

    def __init__(self, runner, *, most: int) -> None:
        self._runner = runner
        self._most = most

    def compute(self, chunks):
        if sum(len(chunk.tokens) for chunk in chunks) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._runner.compute(chunks)

    def survives(self, error):
        return isinstance(error, torch.OutOfMemoryError)


def test_a_step_that_was_refused_memory_ends_its_answers_and_no_others(tiny_model):
    solo = Solo(
        tiny_model,
        adapt=lambda model: replace(model, runner=SmallGpu(model.runner, most=100)),
    )
    (small,) = solo.run(request(tuple(range(20, 60))))
    (large,) = solo.run(request(tuple(range(20, 160))))
    assert large.finish is FinishReason.ERROR
    assert large.last.error == "OutOfMemoryError in a step"
    assert solo.run(request(tuple(range(20, 60))))[0].token_ids == small.token_ids
