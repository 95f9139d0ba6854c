"""Two real models on a node that has memory for one of them."""

from __future__ import annotations

import json
import subprocess
from functools import partial

import psutil
import pytest
import trio
from devnets import NODE, devnet
from real_models import installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.fleet.berth import FleetModel
from pinaivu_node.engine.fleet.fleet import FleetConfig, open_fleet
from pinaivu_node.engine.fleet.footprint import footprint_of, resident_bytes
from pinaivu_node.engine.fleet.residency import Residence
from pinaivu_node.engine.types import EngineBusy, GenerationRequest, SamplingParams

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SMALL, LARGE = "smollm2:135m", "gemma3:270m"


def model_of(name: str) -> FleetModel:
    model = installed(name)
    config = EngineConfig(model=model.folder, device="cpu", threads=1, kv_cache_gb=0.5)
    footprint = footprint_of(config)
    return FleetModel(
        name=name,
        open=partial(open_engine, config),
        need=footprint.need,
        spare=footprint.spare,
        load_s=footprint.load_s,
        context_window=model.context_window,
    )


def memory_of(engine):
    return None if engine.pid is None else resident_bytes(engine.pid)


async def continuation(engine, *, tokens=8):
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    async with engine.generate(
        GenerationRequest("r", "The capital of France is", sampling)
    ) as events:
        return "".join([event.text async for event in events])


def engine_processes():
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "pinaivu_node.engine.child" in child.cmdline()
    ]


async def test_two_models_take_turns_where_only_one_fits():
    models = [model_of(SMALL), model_of(LARGE)]
    budget = models[1].need + 10**8
    async with open_fleet(models, FleetConfig(budget=budget), memory_of=memory_of) as fleet:
        small, large = fleet.engines.values()
        await small.wait_ready()
        assert small.standing().residence is Residence.WARM
        assert large.standing().residence is Residence.COLD
        promised = large.statistics().ttft_estimate_ms
        began = trio.current_time()
        assert "France" in await continuation(large)
        took = trio.current_time() - began
        assert small.standing().residence is Residence.COLD
        assert len(engine_processes()) == 1
        assert 0.1 * promised < 1000 * took < 10 * promised, "an estimate, not a guess"

        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        async with large.generate(GenerationRequest("long", "One day", sampling)) as events:
            await anext(aiter(events))
            with pytest.raises(EngineBusy, match="no memory for it while gemma3:270m is in use"):
                await continuation(small)

        promised = small.statistics().ttft_estimate_ms
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            seen = []

            async def watch():
                while small.standing().residence is not Residence.WARM:
                    seen.append(small.standing().progress)
                    await trio.sleep(0.05)

            nursery.start_soon(watch)
            assert await continuation(small)
        took = trio.current_time() - began
        assert 1000 * took == pytest.approx(promised, rel=1.0), "it was loaded before"
        assert seen == sorted(seen)
        assert len(engine_processes()) == 1
    assert not engine_processes()


def standings(home):
    command = [*NODE, "status", "--home", str(home / "provider-1"), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return {each["model"]: each["standing"] for each in json.loads(said)["models"]}


def test_a_node_with_memory_for_one_of_its_models_sells_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PINAIVU_MEMORY_BUDGET_GB", "3.6")
    with devnet(tmp_path, "--providers", "1", "--model", SMALL, "--model", LARGE) as network:
        at_first = standings(network.home)
        assert at_first[SMALL]["residence"] == "warm", "the first in the list"
        assert at_first[LARGE]["residence"] == "cold"
        assert at_first[LARGE]["delay_ms"] > 1000
        assert network.chat()["choices"][0]["message"]["content"]
        body = {"model": LARGE, "prompt": "The capital of France is", "max_tokens": 8}
        with network.http() as client:
            answer = client.post("/completions", json=body | {"temperature": 0})
        assert answer.status_code == 200, answer.text
        assert "France" in answer.json()["choices"][0]["text"]
        now = standings(network.home)
        assert now[LARGE]["residence"] == "warm"
        assert now[SMALL]["residence"] == "cold"
        assert network.chat()["choices"][0]["message"]["content"], "and back again"
