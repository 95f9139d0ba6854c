"""GGUF files that are none, or not whole: refused before anything is read or converted."""

from __future__ import annotations

import random
import struct
import time

import numpy as np
import pytest

from pinaivu_node.models.errors import PullFailed
from pinaivu_node.models.gguf_header import _PACKED, check_gguf
from pinaivu_node.models.progress import SilentProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import ModelStore


@pytest.fixture
def file(tmp_path, tiny_gguf):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    return path


def refusal(path) -> str:
    began = time.process_time()
    with pytest.raises(PullFailed, match="cannot be converted") as refused:
        pull(ModelStore(path.parent / "store"), str(path), progress=SilentProgress())
    assert time.process_time() - began < 1
    return str(refused.value)


def test_a_whole_file_is_whole(file):
    assert check_gguf(file) == ("F32",)


def test_the_sizes_of_packed_weights_are_ggufs_own():
    import gguf

    own = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: own[kind] for kind in _PACKED} == _PACKED


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_quantised_files_are_measured_to_the_byte(tmp_path, kind):
    import gguf

    path = tmp_path / "packed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    weights = np.random.default_rng(7).normal(size=(6, 64)).astype(np.float32)
    quantised = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("w", gguf.quants.quantize(weights, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(path) == (kind,)
    whole = path.read_bytes()
    padding = len(whole) - len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: len(whole) - padding - 40])
    assert "it broke off" in refusal(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: b"", "no GGUF file"),
        (lambda whole: b"PK\3\4" + whole[4:], "no GGUF file"),
        (lambda whole: whole[:4], "broke off within its header"),
        (lambda whole: whole[:300], "broke off within its header"),
        (lambda whole: whole[: len(whole) // 2], "it broke off, "),
        (lambda whole: whole[:-200], "it broke off, "),
        (lambda whole: whole[:4] + struct.pack("<I", 99) + whole[8:], "version 99"),
        (lambda whole: whole[:8] + struct.pack("<Q", 2**40) + whole[16:], "1,099,511,627,776"),
        (lambda whole: whole[:16] + struct.pack("<Q", 2**63) + whole[24:], "values"),
        (lambda whole: whole[:16] + struct.pack("<Q", 999_999) + whole[24:], ""),
        (lambda whole: whole[:24] + struct.pack("<Q", 2**63) + whole[32:], "within its header"),
        (lambda whole: b"GGUF\3\0\0\0" + random.Random(7).randbytes(5000), "damaged"),
    ],
)
def test_a_file_that_is_damaged_says_how(file, damage, reason):
    file.write_bytes(damage(file.read_bytes()))
    assert reason in refusal(file)


def test_one_part_of_several_says_how_to_join_them(tmp_path):
    import gguf

    path = tmp_path / "model-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "one of 3 parts: join them" in refusal(path)


def test_whatever_bytes_are_flipped_the_header_is_refused_or_read(file):
    whole = file.read_bytes()
    dice = random.Random(7)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(8, 4000)] = dice.randrange(256)
        file.write_bytes(damaged)
        began = time.process_time()
        try:
            check_gguf(file)
        except PullFailed as exc:
            assert "cannot be converted" in str(exc)  # noqa: PT017 - not every flip is damage
        assert time.process_time() - began < 0.5
