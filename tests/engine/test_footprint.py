"""What a model will take, by its files; what a process takes, by the system."""

from __future__ import annotations

import json
import os

import psutil
import pytest

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.fleet.footprint import (
    default_budget,
    footprint_of,
    kv_bytes,
    resident_bytes,
    weigh,
)

GIB = 2**30


def folder_with(tmp_path, header: bytes, *, length=None, body=0):
    path = tmp_path / "model.safetensors"
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(body))
    return tmp_path


def header_of(**tensors) -> bytes:
    said = {name: {"dtype": "BF16", "shape": shape} for name, shape in tensors.items()}
    return json.dumps({"__metadata__": {"format": "pt"}, **said}).encode()


def test_weights_are_counted_without_being_read(tmp_path):
    folder = folder_with(tmp_path, header_of(a=[1000, 30], b=[7], scalar=[]), body=60_016)
    assert weigh(folder).values == 30_008
    assert weigh(folder).bytes_on_disk > 60_016


def test_the_tiny_model_is_counted_as_its_own_library_counts_it(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert weigh(tiny_model).values == model.num_parameters()


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"a": 3}', None),
        (b'{"a": {"shape": "wide"}}', None),
        (b"{}", 2**60),
    ],
)
def test_a_file_that_makes_no_sense_counts_by_its_size(tmp_path, header, length):
    folder = folder_with(tmp_path, header, length=length, body=10_000)
    assert weigh(folder).values == (8 + len(header) + 10_000) // 2


def test_an_empty_folder_weighs_nothing_and_breaks_nothing(tmp_path):
    assert weigh(tmp_path).values == 0
    assert footprint_of(EngineConfig(model=tmp_path, device="cpu")).need > 0


def test_the_type_of_the_weights_in_memory_counts_and_not_that_on_disk(tmp_path):
    folder = folder_with(tmp_path, header_of(a=[10**6]))
    needs = [
        footprint_of(EngineConfig(model=folder, device="cpu", dtype=dtype)).need
        for dtype in ("float32", "bfloat16", "auto")
    ]
    assert needs[0] - needs[1] == 2 * 10**6
    assert needs[2] == needs[0]


def test_weights_in_int8_take_a_byte_and_the_cache_what_it_took(tmp_path):
    folder = folder_with(tmp_path, header_of(a=[10**6]))
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    said = {**shape, "max_position_embeddings": 1000}
    (folder / "config.json").write_text(json.dumps(said))
    whole = EngineConfig(model=folder, device="cpu")
    quantised = EngineConfig(model=folder, device="cpu", quantization="int8")
    assert footprint_of(whole).need - footprint_of(quantised).need == 3 * 10**6
    assert kv_bytes(whole) == kv_bytes(quantised)


def test_the_cache_is_what_it_was_given_or_one_context(tmp_path):
    shape = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": shape}))
    config = EngineConfig(model=tmp_path, device="cpu")
    assert kv_bytes(config) == 2 * 30 * 3 * 64 * 8192 * 4
    assert kv_bytes(config.model_copy(update={"kv_cache_gb": 2.0})) == 2 * GIB
    assert kv_bytes(config.model_copy(update={"dtype": "bfloat16"})) == 30 * 3 * 64 * 8192 * 4
    (tmp_path / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 10**6}))
    assert kv_bytes(config) == GIB, "no more than that is insisted on"


def test_a_process_is_measured_and_one_that_is_gone_is_not():
    mine = resident_bytes(os.getpid())
    assert 0 < mine <= 1.1 * psutil.Process().memory_info().rss
    block = bytearray(os.urandom(1) * 64 * 2**20)
    grown = resident_bytes(os.getpid()) - mine
    assert grown == pytest.approx(len(block), rel=0.2)
    assert resident_bytes(2**22 + 1) is None


def test_the_budget_leaves_the_system_its_share():
    budget = default_budget("cpu")
    assert 0 < budget <= 0.8 * psutil.virtual_memory().total
