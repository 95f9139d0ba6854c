from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager

import httpx
import pytest

from pinaivu_node.models import pull as pulling
from pinaivu_node.models.catalogue import APACHE_2, CATALOGUE, CatalogueEntry, HubSource
from pinaivu_node.models.errors import ModelDamaged, ModelMissing, PullFailed
from pinaivu_node.models.hub import Hub
from pinaivu_node.models.progress import SilentProgress
from pinaivu_node.models.pull import pull
from pinaivu_node.models.store import ModelStore

from .hub_server import serving

REPO = "acme/Tiny-1"
WEIGHTS = bytes(range(256)) * 5000
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": json.dumps({"max_position_embeddings": 4096}).encode(),
    "tokenizer.json": b"{}" * 1000,
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "LICENSE": b"be nice",
    "empty.txt": b"",
    "manifest.json": b"not ours",
    "modeling_evil.py": b"raise SystemExit",
    "onnx/model.safetensors": b"another format",
    "../escape.json": b"{}",
    "consolidated.safetensors": b"a second copy",
}
WANTED = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
          "LICENSE", "empty.txt"}  # fmt: skip
ENTRY = CatalogueEntry(
    name="tiny:1",
    title="Tiny 1",
    owner="acme",
    licence=APACHE_2,
    source=HubSource(REPO),
    context_window=8192,
    disk_bytes=1,
)


@pytest.fixture
def server(monkeypatch):
    catalogue = {**CATALOGUE, ENTRY.name: ENTRY}
    monkeypatch.setattr("pinaivu_node.models.catalogue.CATALOGUE", catalogue)
    with serving(REPO, FILES, lfs={"model.safetensors"}) as server:
        yield server


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


class Notes(SilentProgress):
    def __init__(self):
        self.notes: list[str] = []
        self.starts: list[int] = []
        self._begun = False

    def step(self, what, *, total=None):
        self._begun = True

    def advance(self, done, *, total=None):
        if self._begun:
            self.starts.append(done)
        self._begun = False

    def note(self, text):
        self.notes.append(text)


@contextmanager
def hub(server, *, token=None, pauses=None):
    with httpx.Client(follow_redirects=True) as client:
        pause = (lambda seconds: None) if pauses is None else pauses.append
        yield Hub(client, endpoint=server.url, token=token, pause=pause)


def fetch(store, server, **options):
    with hub(server, **options) as opened:
        return pull(store, "tiny:1", progress=Notes(), hub=opened)


def test_a_pull_brings_what_is_needed_and_nothing_else(store, server):
    model = fetch(store, server)
    names = {path.name for path in model.folder.iterdir()}
    assert names == WANTED | {"manifest.json"}
    assert (model.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert model.digest == "sha256:" + hashlib.sha256(WEIGHTS).hexdigest()
    assert (model.name, model.owner, model.context_window, model.chat) == (
        "tiny:1", "acme", 4096, True,
    )  # fmt: skip
    assert store.resolve("tiny:1") == model
    assert store.installed() == [model]
    assert not list((store.root / ".partial").iterdir())
    assert not (store.root.parent / "escape.json").exists()


def test_a_second_pull_asks_nobody(store, server):
    fetch(store, server)
    asked = len(server.requests)
    fetch(store, server)
    assert len(server.requests) == asked


def test_a_connection_that_breaks_is_taken_up_where_it_broke(store, server):
    server.cut_at["model.safetensors"] = [100_000, 200_000]
    pauses: list[float] = []
    fetch(store, server, pauses=pauses)
    ranges = [wanted for path, wanted in server.requests if path == "/cdn/model.safetensors"]
    assert ranges == [None, "bytes=100000-", "bytes=300000-"]
    assert pauses == [1.0, 1.0]


def test_a_pull_that_was_given_up_goes_on_at_the_next(store, server):
    server.cut_at["model.safetensors"] = [300_000] + [0] * 20
    with pytest.raises(PullFailed, match="pull again, it goes on from there"):
        fetch(store, server)
    with pytest.raises(ModelMissing):
        store.resolve("tiny:1")
    server.cut_at.clear()
    server.requests.clear()
    fetch(store, server)
    assert ("/cdn/model.safetensors", "bytes=300000-") in server.requests
    assert ("/cdn/tokenizer.json", None) not in server.requests


def test_a_server_that_knows_no_ranges_is_asked_for_everything_again(store, server):
    server.ranges = False
    server.cut_at["model.safetensors"] = [300_000]
    assert fetch(store, server).digest == "sha256:" + hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_found_deleted_and_can_be_pulled_again(store, server, name):
    server.damaged.add(name)
    with pytest.raises(PullFailed, match="came damaged"):
        fetch(store, server)
    with pytest.raises(ModelMissing):
        store.resolve("tiny:1")
    server.damaged.clear()
    fetch(store, server)


def test_a_gated_repository_says_how_to_get_in(store, server):
    server.token = "hf_right"
    with pytest.raises(PullFailed, match="HF_TOKEN"):
        fetch(store, server)
    assert fetch(store, server, token="hf_right").name == "tiny:1"


def test_a_busy_hub_is_asked_again_and_a_missing_one_is_reported(store, server):
    server.status = [503]
    with pytest.raises(PullFailed, match="cannot be reached"):
        fetch(store, server)
    with hub(server) as opened, pytest.raises(PullFailed, match="HF_ENDPOINT"):
        opened.snapshot(HubSource("acme/nothing"))
    server.url = "http://127.0.0.1:9"
    with pytest.raises(PullFailed, match="cannot be reached"):
        fetch(store, server)


def test_a_hub_that_lies_about_sizes_does_not_fill_the_disk(store, server):
    with hub(server) as opened:
        snapshot = opened.snapshot(HubSource(REPO))
        (weights,) = [file for file in snapshot.files if file.name == "model.safetensors"]
        store.root.mkdir()
        server.files = {**FILES, "model.safetensors": WEIGHTS * 2}
        with pytest.raises(PullFailed, match="sends more"):
            opened.fetch(snapshot, weights, store.root, progress=SilentProgress())
        assert not list(store.root.iterdir())


def _listing(*siblings: dict) -> bytes:
    return json.dumps({"sha": "a" * 40, "siblings": siblings}).encode()


UNREADABLE = [
    b"",
    b"[]",
    b"{}",
    b'{"sha": "x", "siblings": []}',
    _listing(*[{"rfilename": "a.json"}] * 300),
    _listing({"rfilename": "a.safetensors", "lfs": {}}),
    _listing({"rfilename": "a.safetensors", "lfs": {"sha256": "../x", "size": 1}}),
    _listing({"rfilename": "a.safetensors", "size": "x"}),
    _listing(),
]


@pytest.mark.parametrize("answer", UNREADABLE)
def test_an_unreadable_answer_is_the_hubs_fault(answer):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=answer))
    with httpx.Client(transport=transport) as client:
        strange = Hub(client, endpoint="http://hub", token=None)
        with pytest.raises(PullFailed, match=r"unreadable|no safetensors"):
            strange.snapshot(HubSource(REPO))


def test_a_model_that_was_changed_on_disk_is_noticed_and_repaired(store, server):
    model = fetch(store, server)
    weights = model.folder / "model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(ModelDamaged, match="models pull tiny:1"):
        store.resolve("tiny:1")
    assert store.installed() == []
    fetch(store, server)
    assert weights.read_bytes() == WEIGHTS


def test_the_weights_of_a_pinned_entry_may_not_change(store, server, monkeypatch):
    pinned = CatalogueEntry(
        **{name: getattr(ENTRY, name) for name in CatalogueEntry.__slots__}
        | {"digest": "sha256:" + "0" * 64}
    )
    monkeypatch.setattr(pulling, "find", lambda name: pinned)
    with pytest.raises(PullFailed, match="other weights"):
        fetch(store, server)


def test_a_full_disk_says_so(store, server, monkeypatch):
    huge = CatalogueEntry(
        **{name: getattr(ENTRY, name) for name in CatalogueEntry.__slots__} | {"disk_bytes": 2**70}
    )
    monkeypatch.setattr(pulling, "find", lambda name: huge)
    with pytest.raises(PullFailed, match="make room"):
        fetch(store, server)
