"""A GGUF file that the hub has, by the address under which people pass it on."""

from __future__ import annotations

import json
from contextlib import contextmanager

import httpx
import pytest

from pinaivu_node.models import convert
from pinaivu_node.models.errors import ModelMissing, PullFailed
from pinaivu_node.models.hub import Hub
from pinaivu_node.models.progress import SilentProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.reference import HubFileName, hub_file
from pinaivu_node.models.store import ModelStore

from .hub_server import serving

NAME = "hf.co/acme/Tiny-GGUF/Tiny-Test.gguf"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (NAME, HubFileName("acme/Tiny-GGUF", "Tiny-Test.gguf")),
        ("https://" + NAME, HubFileName("acme/Tiny-GGUF", "Tiny-Test.gguf")),
        (
            "https://huggingface.co/acme/Tiny-GGUF/resolve/main/Tiny-Test.gguf?download=true",
            HubFileName("acme/Tiny-GGUF", "Tiny-Test.gguf"),
        ),
        (
            "huggingface.co/acme/Tiny-GGUF/blob/v2/Tiny-Test.gguf",
            HubFileName("acme/Tiny-GGUF", "Tiny-Test.gguf", "v2"),
        ),
        ("hf.co/acme/Tiny-GGUF", HubFileName("acme/Tiny-GGUF", "")),
        ("smollm2:135m", None),
        ("./hf.co/acme/Tiny-GGUF/Tiny-Test.gguf", None),
        ("hf.co/acme", None),
        ("hf.co/../etc/passwd", None),
        ("hf.co/acme/x/../../y.gguf", None),
        ("https://evil.example/hf.co/a/b/c.gguf", None),
    ],
)
def test_an_address_on_the_hub_is_told_from_names_and_paths(text, meant):
    assert hub_file(text) == meant
    if meant is not None:
        assert hub_file(str(meant)) == meant


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def server(tiny_gguf):
    files = {"Tiny-Test.gguf": tiny_gguf.read_bytes(), "Other.gguf": b"GGUF", "README.md": b"x"}
    with serving("acme/Tiny-GGUF", files, lfs={"Tiny-Test.gguf"}) as server:
        yield server


@contextmanager
def hub(server):
    with httpx.Client(follow_redirects=True) as client:
        yield Hub(client, endpoint=server.url, token=None, pause=lambda seconds: None)


@pytest.fixture
def written(monkeypatch):
    """What is converted; the conversion itself takes a process with torch in it."""
    seen = []

    def write(source, target, *, progress):
        seen.append(source.read_bytes())
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("pinaivu_node.models.pull.convert", write)
    assert convert.convert is not write
    return seen


def fetch(store, server, name=NAME):
    with hub(server) as opened:
        return pull(store, name, progress=SilentProgress(), hub=opened)


def test_a_file_is_fetched_converted_once_and_kept_without_its_gguf(
    store, server, written, tiny_gguf
):
    with pytest.raises(ModelMissing, match=f"run `pinaivu-node models pull {NAME}`"):
        store.resolve(NAME)
    model = fetch(store, server)
    assert written == [tiny_gguf.read_bytes()]
    assert (model.name, model.owner, model.context_window) == ("tiny-test", "acme", 128)
    (row,) = server.listing()["siblings"][1:2]
    assert model.digest == f"sha256:{row['lfs']['sha256']}"
    asked = len(server.requests)
    assert fetch(store, server, "https://" + NAME) == model == store.resolve(NAME)
    assert len(server.requests) == asked
    assert not list(store.root.rglob("*.gguf"))
    assert store.conversions() == [(NAME, model)]
    assert store.verify(NAME) == model


def test_it_can_be_removed_by_its_address(store, server, written):
    folder = fetch(store, server).folder
    assert store.remove(NAME) > 0
    assert not folder.exists()
    assert store.conversions() == []
    with pytest.raises(ModelMissing, match="models list"):
        store.remove(NAME)


def test_a_repository_says_which_files_it_has(store, server, written):
    with pytest.raises(PullFailed, match=r"no GGUF file Big\.gguf.*Other\.gguf, Tiny-Test\.gguf"):
        fetch(store, server, "hf.co/acme/Tiny-GGUF/Big.gguf")
    with pytest.raises(PullFailed, match=r"several files: name one as hf\.co/acme/Tiny-GGUF/FILE"):
        fetch(store, server, "hf.co/acme/Tiny-GGUF")
    with pytest.raises(PullFailed, match=r"no GGUF file README\.md"):
        fetch(store, server, "hf.co/acme/Tiny-GGUF/README.md")
    assert written == []


def test_a_file_that_comes_damaged_or_is_none_is_not_converted(store, server, written):
    server.damaged.add("Tiny-Test.gguf")
    with pytest.raises(PullFailed, match="came damaged"):
        fetch(store, server)
    with pytest.raises(PullFailed, match="cannot be converted"):
        fetch(store, server, "hf.co/acme/Tiny-GGUF/Other.gguf")
    assert written == []
    server.damaged.clear()
    fetch(store, server)
