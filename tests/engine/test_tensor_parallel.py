"""What several processes that share a model say to each other; the processes are in tests/live."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model import tensor_parallel
from pinaivu_node.engine.model.step import Step
from pinaivu_node.engine.model.tensor_parallel import (
    LeadingRunner,
    Rank,
    check_devices,
    messages,
)
from pinaivu_node.engine.model.weights import LoadError

STEP = Step([5], [0], [(0, 1, 3, 0)], [[2]])
LLAMA = {"model.layers.*.self_attn.k_proj": "colwise", "lm_head": "colwise_gather_output"}


class Model:
    """As much of transformers' as is asked."""

    class config:  # noqa: N801 - an attribute
        model_type = "llama"

    def __init__(self, plan) -> None:
        self.tp_plan = plan


def test_kv_heads_are_shared_out_where_the_plan_splits_keys():
    rank = Rank(1, 2, Path())
    assert rank.kv_heads(Model(LLAMA), 8) == 4
    assert rank.kv_heads(Model({"lm_head": "colwise_gather_output"}), 3) == 3
    with pytest.raises(LoadError, match="3 KV heads cannot be shared out among 2 GPUs"):
        rank.kv_heads(Model(LLAMA), 3)
    with pytest.raises(LoadError, match="no plan to split a llama over GPUs: run it on one"):
        rank.kv_heads(Model(None), 8)


def test_messages_end_where_the_pipe_does_and_a_half_one_is_none():
    pipe = io.BytesIO()
    for data in (b"orders", STEP.pack(), b""):
        tensor_parallel._write(pipe, data)
    whole = pipe.getvalue()
    orders, step, empty = messages(io.BytesIO(whole))
    assert (orders, Step.unpack(step), empty) == (b"orders", STEP, b"")
    for cut in range(4 + len(b"orders")):
        assert list(messages(io.BytesIO(whole[:cut]))) == []


def test_the_followers_hear_of_a_step_before_the_leader_computes_it():
    said = []

    class Followers:
        def send(self, step):
            said.append(("sent", step))

    class Own:
        def forward(self, step):
            said.append(("computed", step))
            return torch.zeros(1, 4)

    runner = LeadingRunner(Own(), Followers())
    assert runner.forward(STEP).shape == (1, 4)
    assert said == [("sent", STEP), ("computed", STEP)]
    assert not runner.survives(torch.OutOfMemoryError())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_devices_are_checked_before_processes_are_started(tmp_path):
    config = EngineConfig(model=tmp_path, tensor_parallel=2)
    check_devices(config, torch.device("cpu"))
    quantised = config.model_copy(update={"quantization": "int8"})
    with pytest.raises(LoadError, match="quantised"):
        check_devices(quantised, torch.device("cpu"))
    with pytest.raises(LoadError, match="takes the first 2 GPUs"):
        check_devices(config, torch.device("cuda:1"))
    with pytest.raises(LoadError, match="needs as many GPUs, here are 0"):
        check_devices(config, torch.device("cuda"))


def test_a_config_travels_to_followers_as_it_is(tmp_path):
    config = EngineConfig(model=tmp_path, tensor_parallel=3, kv_cache_gb=1.5)
    orders = json.loads(json.dumps({"config": config.model_dump_json()}))
    assert EngineConfig.model_validate_json(orders["config"]) == config
