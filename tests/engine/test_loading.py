"""Folders that are no sound models: refused in a sentence, at once, whatever is wrong with them."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from numba import njit

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.model.compiling import telling_of_compiling
from pinaivu_node.engine.model.loading import LoadError, load
from pinaivu_node.engine.model.weights import check_files, check_folder, is_encoder


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(folder: Path, **config) -> str:
    """Why this folder is not loaded, said within a second and in a sentence."""
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM  # the first use of a name imports a thousand modules
    began = time.process_time()
    with pytest.raises(LoadError) as refused:
        load(EngineConfig(model=folder, device="cpu", threads=1, **config), lambda _s, _w: None)
    # CPU time, for the machine is shared; all of it is spent by tokenizers and safetensors.
    assert time.process_time() - began < 1.0
    said = str(refused.value)
    assert len(said) < 600
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(folder: Path) -> tuple[Path, Path]:
    """The weights in two shards."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    shards = tuple(folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    halves = names[:8], names[8:]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: tensors[name] for name in half}, shard, metadata={"format": "pt"})
    path.unlink()
    placed = {name: shard.name for shard, half in zip(shards, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": placed})
    )
    return shards


def test_a_sound_folder_loads_whole_and_in_shards(folder):
    check_folder(folder)
    split(folder)
    model = load(EngineConfig(model=folder, device="cpu", threads=1), lambda _s, _w: None)
    assert model.context_window == 256
    assert not is_encoder(folder)


@pytest.mark.parametrize("left", [0, 5, 8, 300, -1, -4096])
def test_truncated_weights_are_seen_without_reading_them(folder, left):
    path = folder / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    assert "safetensors" in refusal(folder)
    assert "pull the model again" in refusal(folder)


def test_weights_with_something_behind_them_are_no_weights(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "is damaged" in refusal(folder)


def test_a_shard_that_is_missing_is_named(folder):
    _, second = split(folder)
    second.unlink()
    assert f"{second.name} is missing" in refusal(folder)


def test_an_index_does_not_lead_out_of_its_folder(folder):
    split(folder)
    index = folder / "model.safetensors.index.json"
    rewrite(index, weight_map={"x": "../../etc/passwd"})
    assert "points out of its folder" in refusal(folder)


def test_weights_that_the_config_calls_for_are_missed(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.1.mlp.up_proj.weight"
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    assert gone in refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, bad):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    assert "numbers that are none" in refusal(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled" in refusal(folder)


def test_code_beside_weights_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    rewrite(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    assert "never does" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "sparrow"}, "does not know: upgrade transformers"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "t5"}, "cannot be read"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_attention_heads": 10**10}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 3}, "config.json makes no sense"),
        ({"num_key_value_heads": 4}, "other shapes than its config.json"),
        ({"hidden_size": 64}, "other shapes than its config.json"),
        ({"hidden_size": "large"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": -32}, "hidden_size -32"),
        ({"head_dim": 10**12}, "head_dim 1,000,000,000,000"),
        ({"head_dim": 4}, "other shapes than its config.json"),
        ({"num_hidden_layers": 1}, "speaks of 1 layers"),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1"),
        ({"hidden_act": "nonsense"}, "KeyError 'nonsense'"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1.0}}, "KeyError 'nonsense'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "hot"}}, "cannot be read"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0"),
        ({"max_position_embeddings": -5}, "max_position_embeddings -5"),
        ({"max_position_embeddings": "many"}, "expected int, got str"),
        ({"rms_norm_eps": None}, "Field 'rms_norm_eps' expected float, got NoneType"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ],
)
def test_a_config_that_lies_is_refused(folder, changes, reason):
    rewrite(folder / "config.json", **changes)
    said = refusal(folder)
    assert reason in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\x00", b"[" * 10**5])
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["random", "truncated", "empty", "other"])
def test_a_damaged_tokenizer_is_refused(folder, name, kind):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes({
        "random": random.Random(7).randbytes(50_000),
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "other": b'{"model": {"type": "BPE"}}' if name == "tokenizer.json" else b"[1]",
    }[kind])  # fmt: skip
    assert name.partition(".")[0] in refusal(folder)


def test_a_folder_without_a_part_of_a_model_says_which(folder):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    assert "there is no folder" in refusal(folder / "nowhere")


def test_files_are_checked_in_milliseconds_and_without_torch(folder):
    began = time.process_time()
    check_files(folder)
    assert time.process_time() - began < 0.05


def test_bytes_flipped_anywhere_in_a_header_never_do_more_than_refuse(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    dice = random.Random(7)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(header)] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            check_files(folder)
        except LoadError:
            refused += 1
    assert refused > 250


def test_it_is_told_when_a_kernel_is_compiled_and_not_when_it_is_there():
    told = []
    kernel = njit(lambda: 7)
    with telling_of_compiling(lambda: told.append("compiling")):
        assert kernel() == 7
        assert told == ["compiling"]
        assert kernel() == 7
    assert told == ["compiling"]
