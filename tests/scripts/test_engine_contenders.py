from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.engine.beside import read_stamps
from scripts.benchmarks.engine.contender import Kind, contending
from scripts.benchmarks.engine.contenders.turns import Stamps, descendants, prompts
from scripts.benchmarks.engine.cores import Cores
from scripts.benchmarks.engine.environments import Environment, Unavailable

ECHO = Kind("tests.scripts.echoing_contender", settings={"more": 7})
CORE = max(os.sched_getaffinity(0))


def echoing(**more):
    settings = {"dtype": "float32"} | more
    return contending(ECHO, cores=Cores((CORE,), ()), model=Path("nowhere"), **settings)


def test_a_contender_answers_from_its_core_whatever_its_libraries_print():
    with echoing() as contender:
        assert contender.order("repeat", batch=2) == {"batch": 2, "on": [CORE], "set": 7}
        assert contender.order("repeat")["set"] == 7
        (process,) = [
            pid
            for pid in descendants(os.getpid())
            if b"echoing_contender" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    assert process not in descendants(os.getpid())


def test_a_contender_that_cannot_load_says_why():
    with pytest.raises(Unavailable, match="ValueError: no such dtype"), echoing(dtype="unknown"):
        pass


def test_a_contender_that_dies_leaves_its_last_words():
    with echoing() as contender, pytest.raises(Unavailable, match="ended over die: out of luck"):
        contender.order("die")


def test_what_cannot_be_installed_is_unavailable_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    environment = Environment("odd", "no-such-engine==1.0")
    with pytest.raises(Unavailable, match=r"no-such-engine==1\.0 cannot be installed: ERROR"):
        environment.python()
    assert not environment.is_there


def test_stamps_count_what_was_made_after_a_step():
    stamps = Stamps()
    for tokens in (16, 3, 5):
        stamps.stamp(tokens)
    assert stamps.since(0)["tokens"] == 8
    assert stamps.since(1)["tokens"] == 5
    assert stamps.since(2) == {"tokens": 0, "cpu_s": 0.0, "wall_s": 0.0}


def test_all_contenders_get_the_same_prompts_and_no_two_alike():
    first = prompts(32, length=64, seed=1)
    assert first == prompts(32, length=64, seed=1)
    assert first != prompts(32, length=64, seed=2)
    assert len({tuple(prompt[:4]) for prompt in first}) == 32
    assert {len(prompt) for prompt in first} == {64}


def test_stamps_of_frames_are_read_by_request_and_token(tmp_path):
    path = tmp_path / "stamps"
    path.write_text("100 a 1\n100 b 1\n130 a 2\n140 a 2\n")
    assert read_stamps(path) == {("a", 1): 100, ("b", 1): 100, ("a", 2): 130}


def test_a_model_of_the_llama_family_becomes_gguf_with_the_same_weights(tmp_path):
    import gguf
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.benchmarks.engine.gguf_file import write_gguf

    words = {f"w{number}": number for number in range(64)}
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    Tokenizer(models.BPE(vocab=words, merges=[])).save(str(tmp_path / "tokenizer.json"))
    for dtype in ("float32", "bfloat16"):
        write_gguf(tmp_path, tmp_path / dtype, dtype=dtype)
    weights = {each.name: each for each in gguf.GGUFReader(tmp_path / "float32").tensors}
    assert len(weights) == 2 + 2 * 9
    layer = model.model.layers[0]
    down = torch.tensor(weights["blk.0.ffn_down.weight"].data)
    assert torch.equal(down, layer.mlp.down_proj.weight)
    # Rotary pairs lie side by side there and half a head apart here.
    ours = layer.self_attn.k_proj.weight.reshape(2, 2, 4, 32)
    theirs = torch.tensor(weights["blk.0.attn_k.weight"].data).reshape(2, 4, 2, 32)
    assert torch.equal(theirs, ours.swapaxes(1, 2))
    small = {each.name: each for each in gguf.GGUFReader(tmp_path / "bfloat16").tensors}
    assert small["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert small["blk.0.ffn_down.weight"].n_bytes * 2 == weights["blk.0.ffn_down.weight"].n_bytes


def test_the_options_are_shown_with_examples():
    import subprocess

    said = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks", "engine", "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert "scripts/bench engine --quick" in said
    assert "--against" in said
