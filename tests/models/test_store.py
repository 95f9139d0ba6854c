from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from pinaivu_node.models.catalogue import (
    CATALOGUE,
    HubSource,
    ModelKind,
    WheelFolder,
    WheelSource,
    find,
)
from pinaivu_node.models.errors import ModelDamaged, ModelMissing
from pinaivu_node.models.manifest import WeightsFile, model_digest, read_manifest
from pinaivu_node.models.store import ModelStore, is_path, name_of
from pinaivu_node.protocol.ids import is_model_name


@pytest.fixture
def store(tmp_path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "My Model_7B"
    folder.mkdir()
    (folder / "model-2.safetensors").write_bytes(b"two")
    (folder / "model-1.safetensors").write_bytes(b"one")
    (folder / "config.json").write_text(
        json.dumps({"text_config": {"max_position_embeddings": 99}})
    )
    return folder


def test_every_row_of_the_catalogue_is_sound():
    assert len(CATALOGUE) >= 8
    for name, entry in CATALOGUE.items():
        assert name == entry.name
        assert is_model_name(name)
        assert entry.licence.url.startswith("https://")
        assert entry.context_window >= (256 if entry.kind is ModelKind.EMBEDDING else 2048)
        match entry.source:
            case WheelSource() | WheelFolder():
                assert entry.digest is not None
            case HubSource(repo=repo):
                assert repo.count("/") == 1


def test_special_licences_are_to_be_shown():
    assert CATALOGUE["gemma3:270m"].licence.notice
    assert CATALOGUE["llama3.2:1b"].licence.notice
    assert not CATALOGUE["gemma3:270m"].chat


def test_a_name_that_is_nearly_right_is_helped():
    with pytest.raises(ModelMissing, match=r"did you mean smollm2:135m"):
        find("smolm2:135m")
    with pytest.raises(ModelMissing, match=r"known: smollm2:135m"):
        find("zzz")


def test_a_model_that_is_not_here_says_how_to_get_it(store):
    with pytest.raises(ModelMissing, match="pinaivu-node models pull smollm2:135m"):
        store.resolve("smollm2:135m")
    with pytest.raises(ModelMissing, match="No model is called"):
        store.resolve("unknown:1b")
    with pytest.raises(ModelMissing, match="no model name"):
        store.resolve("NOT a name")
    with pytest.raises(ModelMissing, match="there is no"):
        store.resolve("./nowhere")


def test_the_digest_of_one_file_is_its_own_and_of_several_that_of_their_list():
    one = WeightsFile(name="b", size=1, digest="sha256:" + "1" * 64)
    two = WeightsFile(name="a", size=1, digest="sha256:" + "2" * 64)
    assert model_digest([one]) == one.digest
    listing = f"{'2' * 64}  a\n{'1' * 64}  b\n".encode()
    assert model_digest([one, two]) == "sha256:" + hashlib.sha256(listing).hexdigest()
    assert model_digest([two, one]) == model_digest([one, two])


def test_a_folder_of_ones_own_is_a_model(store, folder):
    model = store.resolve(str(folder))
    assert model.name == "my-model_7b"
    assert (model.context_window, model.chat, model.owner) == (99, False, "local")
    assert model.folder == folder
    listing = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        for name, data in (("model-1.safetensors", b"one"), ("model-2.safetensors", b"two"))
    )
    assert model.digest == "sha256:" + hashlib.sha256(listing.encode()).hexdigest()
    assert {path.name for path in folder.iterdir()} == {
        "model-1.safetensors", "model-2.safetensors", "config.json",
    }  # fmt: skip


def test_a_window_ends_where_a_longrope_would_turn_every_position_otherwise(store, folder):
    said = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    for rope in ("rope_scaling", "rope_parameters"):
        for key in ("type", "rope_type"):
            config = said | {rope: {key: "longrope", "factor": 32}}
            (folder / "config.json").write_text(json.dumps(config))
            assert store.resolve(str(folder)).context_window == 4096
    (folder / "config.json").write_text(json.dumps(said | {"rope_scaling": {"type": "yarn"}}))
    assert store.resolve(str(folder)).context_window == 131072


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", ModelKind.TEXT),
        ("GPT2LMHeadModel", ModelKind.TEXT),
        ("BertModel", ModelKind.EMBEDDING),
        ("XLMRobertaForMaskedLM", ModelKind.EMBEDDING),
    ],
)
def test_a_folder_whose_model_has_no_head_for_text_makes_vectors(store, folder, architecture, kind):
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert store.resolve(str(folder)).kind is kind


def test_what_joins_the_vectors_of_an_encoder_belongs_to_the_model(store, folder):
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    model = store.resolve(str(folder))
    assert model.kind is ModelKind.EMBEDDING
    (folder / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(ModelDamaged):
        store._checked(
            read_manifest(store.local_place(folder).with_suffix(".json")),
            folder, folder, thorough=False,
        )  # fmt: skip


def test_a_changed_folder_of_ones_own_gets_another_digest(store, folder):
    before = store.resolve(str(folder)).digest
    (folder / "model-1.safetensors").write_bytes(b"One")
    assert store.resolve(str(folder)).digest != before
    (folder / "chat_template.jinja").write_text("x")
    (folder / "config.json").write_text("{}")
    assert store.resolve(str(folder)).chat


def test_a_thorough_check_reads_what_the_quick_one_trusts(store, folder):
    weights = folder / "model-1.safetensors"
    status = weights.stat()
    store.resolve(str(folder))
    weights.write_bytes(b"eno")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    store.resolve(str(folder))
    with pytest.raises(ModelDamaged):
        store.verify(str(folder))


def test_a_folder_without_a_model_says_what_is_needed(store, tmp_path):
    with pytest.raises(ModelMissing, match=r"config\.json are needed"):
        store.resolve(str(tmp_path))


def installed_by_hand(store, folder):
    """A pulled model, as far as the store is concerned."""
    model = store.resolve(str(folder))
    manifest = store.local_place(folder).with_suffix(".json")
    target = store.folder_of("tiny:1")
    shutil.copytree(folder, target)
    text = manifest.read_text().replace(f'"name": "{model.name}"', '"name": "tiny:1"')
    (target / "manifest.json").write_text(text)
    return target


def test_a_copied_store_is_the_same_model_although_its_times_changed(store, folder):
    target = installed_by_hand(store, folder)
    os.utime(target / "config.json", ns=(1, 1))
    model = store.resolve("tiny:1")
    assert model.folder == target
    assert store.resolve("tiny:1") == model
    assert [found.name for found in store.installed()] == ["tiny:1"]
    assert store.verify("tiny:1") == model


def test_removing_frees_the_disk_and_half_fetched_files_too(store, folder):
    target = installed_by_hand(store, folder)
    partial = store.partial_folder("tiny:1")
    partial.mkdir(parents=True)
    (partial / "x.partial").write_bytes(b"x" * 1000)
    assert store.remove("tiny:1") > 1000
    assert not target.exists()
    assert not partial.exists()
    with pytest.raises(ModelMissing, match="models list"):
        store.remove("tiny:1")


def test_an_unreadable_manifest_is_damage_and_no_crash(store, folder):
    target = installed_by_hand(store, folder)
    for text in ("", "{", "[]", '{"version": 2}'):
        (target / "manifest.json").write_text(text)
        with pytest.raises(ModelDamaged):
            store.resolve("tiny:1")
        assert store.installed() == []


def _hold(root: Path, held, release) -> None:
    with ModelStore(root).lock("tiny:1"):
        held.set()
        release.wait()


def test_one_process_at_a_time_and_the_next_is_told_to_wait(store):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(store.root, held, release))
    other.start()
    assert held.wait(20)
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(True)
        release.set()

    with store.lock("tiny:1", waiting=waiting):
        pass
    other.join()
    assert waited == [True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("smollm2:135m", False), ("./x", True), ("~/x", True), ("/x", True), ("x.gguf", True)],
)
def test_paths_are_told_from_names(text, expected):
    assert is_path(text) is expected


@pytest.mark.parametrize("path", ["Ü ber", "...", "a" * 200, "Qwen3-0.6B.gguf"])
def test_any_folder_gets_a_name_that_is_one(path):
    assert is_model_name(name_of(Path("/models") / path))
