"""The cache of GPUs, run on a CPU and held to what the CPU's own cache says."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pinaivu_node.engine.batching.blocks import BlockPool
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.attention import Look
from pinaivu_node.engine.model.cpu_cache import CpuKvCache, KvShape
from pinaivu_node.engine.model.cuda_cache import CudaKvCache
from pinaivu_node.engine.model.cuda_graphs import DecodeGraphs
from pinaivu_node.engine.model.gpu_memory import Memory
from pinaivu_node.engine.model.gpu_runner import Gpu, made_ready
from pinaivu_node.engine.model.paged_attention import (
    Place,
    attention_for,
    flash,
    flash_may_run,
    gathered,
    torch_has_paged_flash,
)
from pinaivu_node.engine.model.runner import Runner

sys.path.insert(0, str(Path(__file__).parent))
from solo import Solo, request

CPU = torch.device("cpu")
SHAPE = KvShape(1, 2, 16, torch.float32)
STEPS = {
    "prompts and a next token": [[0, 9, 0, 0], [9, 1, 0, 1], [10, 70, 0, 2]],
    "next tokens": [[0, 1, 9, 0], [1, 1, 1, 1], [2, 1, 70, 2]],
    "next tokens and a chunk": [[0, 1, 10, 0], [1, 4, 2, 1], [5, 1, 71, 2]],
}
LOOKS = {
    "everything": Look(0.25),
    "a window": Look(0.25, 7),
    "a soft cap": Look(0.25, 0, 5.0),
    "both": Look(0.25, 3, 2.0),
}


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_gathered_pages_give_what_the_cpus_own_kernel_gives(look):
    generator = torch.Generator().manual_seed(1)
    own = CpuKvCache(SHAPE, pages=8, window=256)
    paged = CudaKvCache(SHAPE, pages=8, window=256, device=CPU, page=own.page)
    # What a page held before it was given to this sequence is not to be read.
    paged.keys[:], paged.values[:] = torch.nan, torch.nan
    tables = torch.tensor([[3, 1], [5, 2], [4, 0]])
    for rows in STEPS.values():
        tokens = sum(count for _, count, _, _ in rows)
        query, key, value = (
            torch.randn(tokens, heads, 16, generator=generator) for heads in (6, 2, 2)
        )
        expected, said = (
            cache.attend(
                0, query, key, value, look=look, batch=cache.batch(torch.tensor(rows), tables)
            )
            for cache in (own, paged)
        )
        torch.testing.assert_close(said, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("row", [[0, 2, 255, 0], [0, 1, 256, 0]])
def test_a_position_beyond_the_window_is_an_error_before_anything_is_written(row):
    paged = CudaKvCache(SHAPE, pages=8, window=256, device=CPU, page=64)
    with pytest.raises(ValueError, match="beyond the context window"):
        paged.batch(torch.tensor([row]), torch.tensor([[0, 1, 2, 3]]))


def test_a_position_beyond_the_pages_is_an_error_before_anything_is_written():
    paged = CudaKvCache(SHAPE, pages=8, window=256, device=CPU, page=64)
    with pytest.raises(IndexError):
        paged.batch(torch.tensor([[0, 1, 64, 0]]), torch.tensor([[0]]))


def test_a_batch_of_another_cache_is_refused():
    own = CpuKvCache(SHAPE, pages=1, window=64)
    paged = CudaKvCache(SHAPE, pages=1, window=64, device=CPU, page=64)
    batch = own.batch(torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0]]))
    some = torch.zeros(1, 2, 16)
    with pytest.raises(TypeError):
        paged.attend(0, some, some, some, batch=batch, look=Look(1.0))


def test_a_cpu_gathers():
    assert attention_for(CPU, torch.bfloat16, head_dim=64) is gathered
    assert not flash_may_run(torch.device("cuda"), torch.float32, head_dim=64)
    assert not flash_may_run(torch.device("cuda"), torch.bfloat16, head_dim=320)


@pytest.mark.skipif(not torch_has_paged_flash(), reason="this torch has no FlashAttention of pages")
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("spans", [((0, 1, 299), (1, 1, 6)), ((0, 5, 300), (5, 1, 0))])
def test_torchs_flash_attention_takes_what_it_is_given(spans, window):
    """As far as shapes and types go: there is no GPU in it."""
    tokens = sum(count for _, count, _ in spans)
    with FakeTensorMode():

        def some(*sizes, dtype=torch.int32):
            return torch.empty(*sizes, device="cuda", dtype=dtype)

        query = some(tokens, 6, 64, dtype=torch.bfloat16)
        pages = some(4, 256, 2, 64, dtype=torch.bfloat16)
        place = Place(some(tokens, dtype=torch.int64), some(2, 2), some(3), some(3), some(2), spans)
        output = flash(query, pages, pages, place, Look(0.125, window))
    assert output.shape == query.shape
    assert output.dtype == torch.bfloat16


# --- the whole engine over it ---------------------------------------------------------------------


def paged(solo_model, *, page=16, pages=40, counts=()):
    """The same model over the GPU's cache, decode steps of so many rows recorded."""
    runner = solo_model.runner
    shape = KvShape(2, 2, 8, torch.float32)
    cache = CudaKvCache(shape, pages=pages, window=solo_model.context_window, device=CPU, page=page)
    graphs = None
    if counts:
        graphs = DecodeGraphs()
        graphs.record(
            runner._model, cache, counts=counts, recorder=lambda compute: compute,
            progress=lambda rows: None,
        )  # fmt: skip
    return replace(
        solo_model,
        runner=Runner(runner._model, cache, graphs=graphs),
        pool=BlockPool(pages, size=page),
    )


def some_requests(dice: random.Random):
    return [
        request(
            tuple(dice.randrange(258) for _ in range(dice.choice([1, 5, 40, 90]))),
            id=str(number),
            temperature=dice.choice([0.0, 1.0]),
            seed=number,
            logprobs=0,
            ignore_eos=True,
            max_tokens=dice.choice([1, 5, 30]),
        )
        for number in range(12)
    ]


@pytest.fixture(scope="module")
def expected(tiny_model):
    return Solo(tiny_model, prefill_chunk=16).run(*some_requests(random.Random(3)))


@pytest.mark.parametrize("counts", [(), (1, 2, 4, 8)], ids=["told each time", "recorded"])
@pytest.mark.parametrize("pages", [96, 12], ids=["room", "preempted"])
def test_the_engine_says_the_same_over_pages(tiny_model, expected, counts, pages):
    solo = Solo(
        tiny_model,
        prefill_chunk=16,
        adapt=lambda model: paged(model, pages=pages, counts=counts),
    )
    said = solo.run(*some_requests(random.Random(3)))
    assert (solo.loop._scheduler.preemptions > 0) == (pages == 12)
    for ours, right in zip(said, expected, strict=True):
        assert ours.token_ids == right.token_ids
        assert ours.text == right.text
        for a, b in zip(ours.logprobs, right.logprobs, strict=True):
            assert a.chosen.logprob == pytest.approx(b.chosen.logprob, abs=1e-4)


def test_a_prefix_is_found_again_in_pages(tiny_model):
    solo = Solo(tiny_model, adapt=paged)
    prompt = tuple(range(20, 120))
    (first,) = solo.run(request(prompt))
    (again,) = solo.run(request(prompt))
    assert again.token_ids == first.token_ids
    assert (first.last.cached_tokens, again.last.cached_tokens) == (0, 96)


def test_guesses_are_checked_over_pages(tiny_model):
    prompt = (7, 8, 9, 10) * 12
    wanted = Solo(tiny_model).run(request(prompt, max_tokens=40, ignore_eos=True))[0]
    solo = Solo(tiny_model, speculate=4, adapt=lambda model: paged(model, counts=(1, 2)))
    (said,) = solo.run(request(prompt, max_tokens=40, ignore_eos=True))
    assert said.token_ids == wanted.token_ids


def as_on_a_gpu(model, *, config, memory: Memory, told: list):
    """The model as it would be made ready on a GPU of so much memory."""

    def measure(work):
        work()
        told.append("measured")
        return memory

    gpu = Gpu(
        gathered, measure, recorder=lambda compute: compute, agree=lambda pages: pages - 1
    )  # fmt: skip
    ready = made_ready(
        model.runner._model, KvShape(2, 2, 8, torch.float32), config, gpu=gpu,
        window=model.context_window, progress=lambda share, what: told.append((share, what)),
    )  # fmt: skip
    pool = BlockPool(ready.pages, size=ready.page)
    return replace(model, runner=ready.runner, pool=pool, context_window=ready.window)


def test_what_is_made_ready_on_a_gpu_answers(tiny_model, expected):
    told = []
    # A page of 64 positions takes 16 KiB, and two copies of one of two layers as much again.
    memory = Memory(total=2**20, used=2**18, work=2**16)
    config = EngineConfig(model=tiny_model, max_running=4, memory_fraction=0.75)
    solo = Solo(
        tiny_model,
        prefill_chunk=16,
        max_running=4,
        adapt=lambda model: as_on_a_gpu(model, config=config, memory=memory, told=told),
    )
    # 0.75 MiB, less a quarter, less twice the work: 12 pages, one is spare, and another has one
    # less.
    assert (solo.model.pool.count, solo.model.pool.size) == (10, 64)
    assert told[1] == "measured"
    assert [what for _, what in told[2:]] == [f"recording decode steps of {n}" for n in (4, 2, 1)]
    shares = [share for share, _ in (told[0], *told[2:])]
    assert shares == sorted(shares)
    said = solo.run(*some_requests(random.Random(3)))
    assert [each.token_ids for each in said] == [each.token_ids for each in expected]


def test_a_window_that_does_not_fit_is_made_shorter(tiny_model):
    memory = Memory(total=2**20, used=2**19, work=0)
    config = EngineConfig(model=tiny_model, max_running=1, memory_fraction=0.7)
    solo = Solo(
        tiny_model,
        adapt=lambda model: as_on_a_gpu(model, config=config, memory=memory, told=[]),
    )
    assert solo.model.pool.count == 4
    assert solo.model.context_window == 256
    config = EngineConfig(model=tiny_model, max_running=1, memory_fraction=0.63)
    solo = Solo(
        tiny_model,
        adapt=lambda model: as_on_a_gpu(model, config=config, memory=memory, told=[]),
    )
    assert solo.model.context_window == solo.model.pool.count * 64 < 256
