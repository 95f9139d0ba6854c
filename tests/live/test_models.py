"""Models as files come: converted from GGUF, in eight bits, and broken in every way."""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import trio
from devnets import devnet, eventually
from test_engine import answer, chat, ids_of, installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.fleet.berth import FleetModel
from pinaivu_node.engine.fleet.fleet import FleetConfig, open_fleet
from pinaivu_node.engine.types import EngineBusy, EngineDead
from pinaivu_node.models.progress import SilentProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import InstalledModel, ModelStore
from pinaivu_node.models.variants import int8_digest
from scripts.benchmarks.engine.gguf_file import write_gguf

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def smollm2() -> InstalledModel:
    return installed("smollm2:135m")


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []

    def step(self, what, *, total=None):
        self.steps.append(what)

    def note(self, text):
        self.notes.append(text)


# --- GGUF -----------------------------------------------------------------------------------------


def packing(kind):
    """A writer of GGUF files that quantises matrices."""
    import gguf

    class Packing(gguf.GGUFWriter):
        def add_tensor(self, name, tensor, **options):
            if tensor.ndim < 2:
                return super().add_tensor(name, tensor, **options)
            packed = gguf.quants.quantize(tensor, kind)
            return super().add_tensor(name, packed, raw_dtype=kind)

    return Packing


async def said_by(folder: Path) -> list[int]:
    async with open_engine(EngineConfig(model=folder, device="cpu", threads=1)) as engine:
        await engine.wait_ready()
        return ids_of(await answer(engine, chat(QUESTION)))


async def test_packed_weights_become_the_float32_that_they_stand_for_and_say_the_same(
    smollm2, tmp_path, monkeypatch
):
    import gguf
    import torch
    from safetensors.torch import load_file, save_file

    packed = gguf.GGMLQuantizationType.Q8_0
    monkeypatch.setattr(gguf, "GGUFWriter", packing(packed))
    file = tmp_path / "SmolLM2.Q8_0.gguf"
    write_gguf(smollm2.folder, file, dtype="float32")
    heard = Heard()
    model = pull(ModelStore(tmp_path / "models"), str(file), progress=heard)
    assert (model.name, model.context_window) == ("smollm2.q8_0", smollm2.context_window)
    assert any("weights (Q8_0, F32) are written out as float32" in note for note in heard.notes)
    assert any("reading the weights" in step for step in heard.steps)

    expected = load_file(smollm2.folder / "model.safetensors")
    for name, tensor in expected.items():
        if tensor.ndim == 2:
            raw = gguf.quants.quantize(tensor.float().numpy(), packed)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, packed))
    converted = load_file(model.folder / "model.safetensors")
    assert converted.keys() == expected.keys()
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())

    # Its tokenizer and its config are those of the file; the template, which it lacks, is not.
    shutil.copy(smollm2.folder / "chat_template.jinja", model.folder)
    own = Path(shutil.copytree(smollm2.folder, tmp_path / "own"))
    save_file(expected, own / "model.safetensors", metadata={"format": "pt"})
    assert await said_by(model.folder) == await said_by(own)


# --- eight bits -----------------------------------------------------------------------------------


def test_a_model_asked_for_in_int8_is_announced_as_such_and_answers(smollm2, tmp_path):
    with devnet(tmp_path, "--providers", "1", "--model", "smollm2:135m-int8") as network:
        nodes = eventually(network.nodes, within=60)
        (offer,) = nodes[0]["models"]
        assert offer["model"] == "smollm2:135m-int8"
        assert offer["digest"] == int8_digest(smollm2.digest)
        said = network.chat(QUESTION, model="smollm2:135m-int8")
        assert "Paris" in said["choices"][0]["message"]["content"]


# --- broken ---------------------------------------------------------------------------------------


def rewritten(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def without_numbers(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2 // 4 * 4)
        file.write(b"\xff" * 4096)


DAMAGE = {
    "truncated": (truncated, "is truncated", 2.0),
    "unknown": (lambda folder: rewritten(folder, model_type="imagined"), "does not know", 2.0),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer", 2.0),
    "no numbers": (without_numbers, "numbers that are none", 20.0),
    "other shapes": (lambda folder: rewritten(folder, intermediate_size=64), "shapes", 20.0),
    "no speaker": (lambda folder: rewritten(folder, model_type="t5"), "cannot be read", 20.0),
}
"""What is done to a model, what is said of it, and within how many seconds of a new process: those
that only torch and the weights can tell take as long as it takes to import and to read them."""


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_broken_model_is_named_by_its_own_process_and_its_mate_answers(
    damage, smollm2, tmp_path
):
    harm, reason, within = DAMAGE[damage]
    broken = Path(shutil.copytree(smollm2.folder, tmp_path / "broken"))
    harm(broken)
    began = time.monotonic()
    async with open_engine(EngineConfig(model=broken, device="cpu", threads=1)) as engine:
        with pytest.raises(EngineDead, match=reason) as caught:
            await engine.wait_ready()
    assert time.monotonic() - began < within
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_broken_model_leaves_the_others_of_its_node_alone(smollm2, tmp_path):
    broken = Path(shutil.copytree(smollm2.folder, tmp_path / "broken"))
    without_numbers(broken)
    models = [
        FleetModel(
            name=name,
            open=partial(open_engine, EngineConfig(model=folder, device="cpu", threads=1)),
            need=10**9,
        )
        for name, folder in (("broken", broken), ("whole", smollm2.folder))
    ]
    async with open_fleet(models, FleetConfig(budget=10**10), memory_of=lambda _: None) as fleet:
        whole = fleet.engines["whole"]
        with trio.fail_after(60):
            await whole.wait_ready()
        with pytest.raises((EngineBusy, EngineDead), match="numbers that are none"):
            await answer(fleet.engines["broken"], chat(QUESTION))
        assert ids_of(await answer(whole, chat(QUESTION)))
        assert whole.statistics().restarts == 0
