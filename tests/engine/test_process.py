"""The daemon's end of the pipe, against a child process that does what it is told."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from pinaivu_node.engine import calls, client, process
from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.frames import Gauges
from pinaivu_node.engine.gauge import SpeedGauge
from pinaivu_node.engine.types import (
    EmbeddingRequest,
    EngineBusy,
    EngineDead,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
)

SCRIPT = Path(__file__).parent / "scripted_child.py"


@pytest.fixture
async def engine(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, str(SCRIPT)))
    settings = EngineConfig(model=tmp_path, max_queued=2, restart_backoff_s=0.05)
    async with open_engine(settings) as engine:
        await engine.wait_ready()
        yield engine


def request(prompt, name="r", **sampling) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(**({"max_tokens": 5} | sampling)))


async def answer(engine, wanted):
    with trio.fail_after(20):
        async with engine.generate(wanted) as events:
            return [event async for event in events]


async def wait_until(condition) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what another process does sets no Event here
            await trio.sleep(0.005)


# -- several answers -------------------------------------------------------------------------------


async def test_a_call_is_over_when_all_its_answers_are(engine):
    events = await answer(engine, request("count", n=3))
    for index in range(3):
        own = [event for event in events if event.index == index]
        assert [token for event in own for token in event.token_ids] == [1, 2, 3, 4, 5]
        assert [event.finish_reason for event in own] == [None] * 4 + [FinishReason.LENGTH]
    assert engine.statistics().running == 0
    assert engine.statistics().generated_tokens == 15


async def test_every_answer_takes_a_place_and_the_queue_is_bounded(engine):
    async with engine.generate(request("wait", "a", n=3)), engine.generate(request("wait", "b")):
        assert (engine.statistics().running, engine.statistics().queued) == (4, 0)
        free = engine.statistics().ttft_estimate_ms
        async with engine.generate(request("wait", "c")):
            statistics = engine.statistics()
            assert (statistics.running, statistics.queued) == (4, 1)
            assert statistics.ttft_estimate_ms > free
            with pytest.raises(EngineBusy, match="4 answers are being written and 1 wait"):
                await answer(engine, request("count", "d", n=2))
    for impossible in (0, 7):
        with pytest.raises(PromptRefused, match="1 to 6 answers"):
            await answer(engine, request("count", n=impossible))
    await wait_until(lambda: engine.statistics().running == 0)


async def test_a_refusal_says_whether_to_come_back(engine):
    with pytest.raises(EngineBusy, match="no blocks"):
        await answer(engine, request("full"))
    assert engine.statistics().running == 0


# -- embeddings ------------------------------------------------------------------------------------


async def test_vectors_come_whole_though_they_were_sent_in_pieces(engine):
    embeddings = await engine.embed(EmbeddingRequest("e", ("", "x", "xx", "xxx", "xxxx")))
    assert [vector[0] for vector in embeddings.vectors] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert embeddings.input_tokens == 5
    with pytest.raises(PromptRefused):
        await engine.embed(EmbeddingRequest("e", ()))


async def test_an_embedding_may_be_left_and_its_place_is_free_again(engine):
    with trio.move_on_after(0.02):
        await engine.embed(EmbeddingRequest("e", ("never",)))
    await wait_until(lambda: engine.statistics().running == 0)
    async with trio.open_nursery() as nursery:

        async def wait_in_vain() -> None:
            with pytest.raises(EngineDead, match="SIGKILL"):
                await engine.embed(EmbeddingRequest("e", ("never",)))

        nursery.start_soon(wait_in_vain)
        await wait_until(lambda: engine.statistics().running == 1)
        os.kill(engine.pid, signal.SIGKILL)


# -- readers that are slow -------------------------------------------------------------------------


async def test_a_reader_that_never_reads_is_ended_and_nobody_else_is(engine, monkeypatch):
    monkeypatch.setattr(calls, "MAX_UNREAD_BYTES", 2**20)
    wanted = request("flood", "lazy", max_tokens=10**6, n=2, logprobs=5)
    async with engine.generate(wanted) as lazy:
        await anext(lazy)
        # Nothing of it is read, and it is cancelled in the child all the same.
        await wait_until(lambda: engine.statistics().running == 0)
        assert len(await answer(engine, request("count", "quick"))) == 5
        events = [event async for event in lazy]
    assert [event.finish_reason for event in events[-2:]] == [FinishReason.ERROR] * 2
    assert {event.index for event in events[-2:]} == {0, 1}
    assert "not read" in events[-1].error
    assert len(events) < 2000


async def test_what_a_stopped_child_does_not_read_is_bounded(engine, monkeypatch):
    monkeypatch.setattr(process, "_MAX_UNSENT_BYTES", 300_000)
    os.kill(engine.pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, engine, request("x" * 250_000, "a"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(EngineBusy, match="not reading"):
            await answer(engine, request("x" * 250_000, "b"))
        os.kill(engine.pid, signal.SIGCONT)
    assert len(await answer(engine, request("x" * 250_000, "b"))) == 5


# -- deaths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ("raise", "exited with status 1: RuntimeError: the device is lost"),
        ("abort", "SIGABRT: terminate called"),
        ("garbage", "broken"),
        ("stray", "broken: answer 7 of r is not open"),
    ],
)
async def test_a_childs_end_has_a_cause_and_a_successor(engine, caplog, prompt, cause):
    with pytest.raises(EngineDead, match=cause):
        await answer(engine, request(prompt))
    await wait_until(lambda: not engine.statistics().ready)
    await engine.wait_ready()
    assert engine.statistics().restarts == 1
    assert cause in caplog.text
    assert len(await answer(engine, request("count"))) == 5


async def test_a_child_that_makes_steps_and_takes_in_no_request_is_hung(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, str(SCRIPT)))
    settings = EngineConfig(model=tmp_path, hang_timeout_s=0.3, restart_backoff_s=0.05)
    async with open_engine(settings) as engine:
        await engine.wait_ready()
        async with engine.generate(request("clock", "mate", max_tokens=10**6)) as mate:
            with pytest.raises(EngineDead, match=r"took in no request for 0\.3 s"):
                await answer(engine, request("deaf"))
            with pytest.raises(EngineDead):
                [event async for event in mate]
        await wait_until(lambda: engine.statistics().ready)
        assert len(await answer(engine, request("count"))) == 5


async def test_a_child_that_took_long_to_load_and_dies_at_once_is_not_taken_for_well(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, str(SCRIPT)))
    monkeypatch.setattr(client, "_STABLE_S", 1.0)
    hold = tmp_path / "hold"
    async with open_engine(EngineConfig(model=tmp_path, restart_backoff_s=0.1)) as engine:
        for _ in range(2):
            hold.touch()
            await trio.sleep(1.0)
            hold.unlink()
            await wait_until(lambda: engine.statistics().ready)
            with pytest.raises(EngineDead):
                await answer(engine, request("raise"))
        await wait_until(lambda: engine.statistics().restarts == 2)
    assert [
        record.message[-16:] for record in caplog.records if "restart in" in record.message
    ] == ["restart in 0.1 s", "restart in 0.2 s"]


# -- what is told about it -------------------------------------------------------------------------


async def test_the_progress_of_loading_can_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, str(SCRIPT)))
    hold = tmp_path / "hold"
    hold.touch()
    async with open_engine(EngineConfig(model=tmp_path)) as engine:
        assert engine.statistics().load_progress == 0.0
        await wait_until(lambda: engine.statistics().load_progress == 0.5)
        with pytest.raises(EngineDead, match=r"still loading \(reading weights, 50 %\)"):
            await answer(engine, request("count"))
        hold.unlink()
        await engine.wait_ready()
        assert engine.statistics().load_progress == 1.0
        assert (engine.statistics().kv_blocks, engine.statistics().kv_blocks_free) == (64, 64)


async def test_the_childs_gauges_are_in_the_statistics_and_outlive_it(engine):
    async with engine.generate(request("gauges", n=3)) as events:
        await anext(events)
        await anext(events)
        await wait_until(lambda: engine.statistics().preemptions)
        statistics = engine.statistics()
        # The child says that one of the three waits for blocks, although a place is free.
        assert (statistics.running, statistics.queued) == (2, 1)
        assert (statistics.kv_blocks, statistics.kv_blocks_free) == (64, 30)
        assert (statistics.input_tokens, statistics.cached_tokens) == (1000, 600)
        assert (statistics.preemptions, statistics.prefix_horizon_s) == (3, 12.5)
        # 10 ms for one alone, 20 ms for two together: 40 ms for the four that there would be.
        assert statistics.tokens_per_second == pytest.approx(25)
        # 2,000 prompt tokens are ahead, at 500 per second of which the streams take half.
        assert statistics.ttft_estimate_ms == pytest.approx(8000, rel=0.05)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await anext(events)
    await wait_until(lambda: not engine.statistics().ready)
    await engine.wait_ready()
    statistics = engine.statistics()
    assert (statistics.input_tokens, statistics.preemptions) == (1000, 3)
    assert statistics.prefix_horizon_s == 0.0


async def test_an_idle_engines_prefixes_grow_older_without_a_word_of_it(autojump_clock):
    child = process.Child(EngineConfig(model=Path("m")), gauge=SpeedGauge(), on_ready=print)
    assert child.prefix_horizon_s() == 0.0
    for running, expected in ((0, 112.5), (1, 12.5)):
        child._hear_gauges(Gauges(running, 0, 30, 0, 0, 0, 12.5, 0.0, 0.0, 0))
        await trio.sleep(100)
        assert child.prefix_horizon_s() == expected
