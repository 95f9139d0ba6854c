"""The engine on a GPU.  Skipped, and says so, where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.torch_model import TorchModel
from pinaivu_node.engine.types import ChatMessage, GenerationRequest, SamplingParams
from pinaivu_node.models.progress import ConsoleProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import ModelStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")


@pytest.fixture(scope="module")
def folder() -> Path:
    store = os.environ.get("PINAIVU_TEST_MODELS", "~/.cache/pinaivu-test/models")
    with ConsoleProgress(Console(stderr=True)) as progress:
        model = pull(ModelStore(Path(store).expanduser()), "smollm2:135m", progress=progress)
    return model.folder


def tokens(model: TorchModel, question: str, **sampling) -> list[int]:
    params = SamplingParams(**({"max_tokens": 48, "temperature": 0.0} | sampling))
    request = GenerationRequest("r", (ChatMessage("user", question),), params)
    return [token for event in model.start(request).steps() for token in event.token_ids]


def test_greedy_answers_are_those_of_transformers_own_generate_on_the_device(folder):
    model = TorchModel.load(EngineConfig(model=folder, device="cuda", dtype="float32"))
    assert model.device.type == "cuda"
    for question in QUESTIONS:
        prompt = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
        ).to("cuda")
        said = model.model.generate(**prompt, max_new_tokens=48, do_sample=False)
        assert tokens(model, question) == said[0, prompt["input_ids"].shape[1] :].tolist()


def test_seeded_draws_in_float32_are_those_of_the_cpu(folder):
    sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 5}
    answers = [
        tokens(
            TorchModel.load(EngineConfig(model=folder, device=device, dtype="float32")),
            QUESTIONS[1],
            **sampling,
        )
        for device in ("cpu", "cuda")
    ]
    # The devices add in different orders; one draw in many may fall to the neighbour.
    same = sum(a == b for a, b in zip(*answers, strict=False))
    assert same >= 8


def test_the_default_on_a_gpu_is_bfloat16_and_it_answers(folder):
    model = TorchModel.load(EngineConfig(model=folder))
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    assert "Paris" in model.decode(tokens(model, QUESTIONS[0]))
    assert model.warm_up().tokens_per_second > 10
