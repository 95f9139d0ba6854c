"""The engine with its real child process, over a tiny real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import (
    ChatMessage,
    EngineBusy,
    EngineDead,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
)


def config(folder, **options) -> EngineConfig:
    return EngineConfig(model=folder, **({"threads": 1, "device": "cpu"} | options))


def request(name="r", prompt=(5, 6, 7), **sampling) -> GenerationRequest:
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True} | sampling
    return GenerationRequest(name, prompt, SamplingParams(**params))


async def answer(engine, wanted: GenerationRequest):
    async with engine.generate(wanted) as events:
        return [event async for event in events]


async def exhaust(events) -> None:
    async for _ in events:
        pass


async def wait_until(condition) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what another process does sets no Event here
            await trio.sleep(0.01)


async def test_a_child_serves_queues_and_cancels_and_is_replaced_when_it_dies(tiny_model):
    # One story, because starting a child takes seconds.
    async with open_engine(config(tiny_model, max_running=1, max_queued=2)) as engine:
        with pytest.raises(EngineDead, match="loading"):
            await answer(engine, request())
        await engine.wait_ready()
        expected = await it_answers(engine)
        await it_refuses(engine)
        await it_queues_and_turns_away(engine, expected)
        await it_cancels(engine)
        await it_dies_and_is_replaced(engine, expected)
        child = engine.pid
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def it_answers(engine) -> list[tuple[int, ...]]:
    events = await answer(engine, request())
    assert [len(event.token_ids) for event in events] == [1] * 20
    assert {event.input_tokens for event in events} == {3}
    assert events[-1].finish_reason is FinishReason.LENGTH
    statistics = engine.statistics()
    assert statistics.ready
    assert (statistics.capacity, statistics.context_window) == (1, 256)
    assert (statistics.device, statistics.dtype) == ("cpu", "float32")
    assert statistics.tokens_per_second > 0
    assert statistics.generated_tokens == 20
    return [event.token_ids for event in events]


async def it_refuses(engine) -> None:
    with pytest.raises(PromptRefused, match="maximum context length is 256 tokens"):
        await answer(engine, request(prompt="x" * 300))
    with pytest.raises(PromptRefused, match="cannot be taken"):
        await answer(engine, request(prompt="x" * 2**25))
    with pytest.raises(PromptRefused, match="cannot be taken"):
        await answer(engine, request(prompt="\ud800"))
    chat = await answer(engine, request(prompt=(ChatMessage("user", "hi"),)))
    assert chat[-1].input_tokens == 21


async def it_queues_and_turns_away(engine, expected) -> None:
    """One runs, two wait, the fourth is turned away at once; the queue is served in order."""
    order: list[str] = []

    async def ask(name: str) -> None:
        events = await answer(engine, request(name))
        assert [event.token_ids for event in events] == expected
        order.append(name)

    os.kill(engine.pid, signal.SIGSTOP)  # so that nobody is done before all have come
    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(ask, name)
            await trio.testing.wait_all_tasks_blocked(0.01)
        statistics = engine.statistics()
        assert (statistics.running, statistics.queued) == (1, 2)
        with pytest.raises(EngineBusy):
            await answer(engine, request("d"))
        with pytest.raises(ValueError, match="running already"):
            await answer(engine, request("a"))
        os.kill(engine.pid, signal.SIGCONT)
    assert order == ["a", "b", "c"]


async def it_cancels(engine) -> None:
    before = engine.statistics().generated_tokens
    async with engine.generate(request("long", max_tokens=250)) as events:
        await anext(events)
    await wait_until(lambda: engine.statistics().running == 0)
    assert engine.statistics().generated_tokens < before + 250


async def it_dies_and_is_replaced(engine, expected) -> None:
    old = engine.pid
    async with engine.generate(request("killed", max_tokens=250)) as events:
        await anext(events)
        os.kill(old, signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await exhaust(events)
    await wait_until(lambda: not engine.statistics().ready)
    with pytest.raises(EngineDead, match="restarted"):
        await answer(engine, request())
    await engine.wait_ready()
    assert engine.pid != old
    assert [event.token_ids for event in await answer(engine, request())] == expected
    assert engine.statistics().restarts == 1


@pytest.mark.live
async def test_a_hung_child_is_noticed_and_replaced(tiny_model):
    settings = config(tiny_model, hang_timeout_s=0.6, ping_interval_s=0.2, restart_backoff_s=0.05)
    async with open_engine(settings) as engine:
        await engine.wait_ready()
        os.kill(engine.pid, signal.SIGSTOP)
        with trio.fail_after(10), pytest.raises(EngineDead, match="hung"):
            await answer(engine, request())
        await engine.wait_ready()
        assert len(await answer(engine, request())) == 20


async def test_a_model_that_cannot_be_loaded_is_reported_and_tried_again(tmp_path):
    async with open_engine(config(tmp_path, restart_backoff_s=0.05)) as engine:
        with pytest.raises(EngineDead, match=r"no config\.json"):
            await engine.wait_ready()
        with pytest.raises(EngineDead, match=r"no config\.json"):
            await engine.wait_ready()
        assert not engine.statistics().ready


async def test_the_child_ends_when_the_daemon_is_killed(tiny_model):
    script = (
        "import sys, trio, pathlib\n"
        "from pinaivu_node.engine.client import open_engine\n"
        "from pinaivu_node.engine.config import EngineConfig\n"
        "async def main():\n"
        "    async with open_engine(EngineConfig(model=pathlib.Path(sys.argv[1]))) as engine:\n"
        "        while engine.pid is None: await trio.sleep(0.01)\n"
        "        print(engine.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", script, str(tiny_model)], stdout=subprocess.PIPE
    )
    child = int(await process.stdout.receive_some(100))
    process.kill()
    await process.wait()
    await process.stdout.aclose()
    await wait_until(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
