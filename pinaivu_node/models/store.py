"""Where models lie on this disk.

    <root>/smollm2@135m/     a model by its catalogue name (no colon: not every file system has it)
    <root>/.partial/         what is being fetched, kept so that a broken-off pull goes on
    <root>/.local/           manifests of folders that lie elsewhere, and conversions of GGUF files
    <root>/.locks/           one process at a time pulls or removes a model

A model folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pinaivu_node.models.catalogue import CATALOGUE, Licence, ModelKind, find
from pinaivu_node.models.errors import ModelDamaged, ModelMissing
from pinaivu_node.models.manifest import (
    MANIFEST,
    LicenceRecord,
    Manifest,
    WeightsFile,
    checked,
    model_digest,
    read_manifest,
    stored_files,
    write_manifest,
)
from pinaivu_node.models.reference import HubFileName, hub_file
from pinaivu_node.protocol.ids import Digest, ModelName, is_model_name

_NO_LIMIT: Final = 2**62


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model that can be run from this disk."""

    name: ModelName
    digest: Digest
    folder: Path
    context_window: int
    chat: bool
    licence: Licence
    owner: str
    bytes_on_disk: int
    kind: ModelKind = ModelKind.TEXT
    quantization: Literal["int8"] | None = None
    """How its weights are to be run, if not as they were published."""


class ModelStore:
    """The models under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def resolve(self, name_or_path: str) -> InstalledModel:
        """The model of this name, or in this folder; ModelMissing or ModelDamaged say what to do.

        Cheap for a model that was pulled: sizes and times are compared with the manifest.  A folder
        of one's own is hashed the first time and whenever its files change.
        """
        if (reference := hub_file(name_or_path)) is not None:
            return self._resolve_converted(self.hub_place(reference), str(reference))
        if is_path(name_or_path):
            return self._resolve_path(Path(name_or_path).expanduser())
        folder = self.folder_of(name_or_path)
        manifest = read_manifest(folder / MANIFEST)
        if manifest is None:
            find(name_or_path)  # an unknown name is told apart from one that is merely not here
            raise ModelMissing(
                f"{name_or_path} is not on this machine: run "
                f"`pinaivu-node models pull {name_or_path}`"
            )
        return self._checked(manifest, folder, folder / MANIFEST, thorough=False)

    def verify(self, name_or_path: str) -> InstalledModel:
        """As `resolve`, but every byte is read and compared."""
        model = self.resolve(name_or_path)
        path = self._manifest_of(model, name_or_path)
        manifest = read_manifest(path)
        if manifest is None:
            raise ModelDamaged(f"{path} is gone: run `pinaivu-node models pull {name_or_path}`")
        return self._checked(manifest, model.folder, path, thorough=True)

    def installed(self) -> list[InstalledModel]:
        """Every model that was pulled and is intact, by name; damaged ones are left out."""
        found: list[InstalledModel] = []
        for path in sorted(self.root.glob(f"[a-z0-9]*/{MANIFEST}")):
            try:
                manifest = read_manifest(path)
                if manifest is not None:
                    found.append(self._checked(manifest, path.parent, path, thorough=False))
            except ModelDamaged:
                continue
        return found

    def conversions(self) -> list[tuple[str, InstalledModel]]:
        """What was made of GGUF files and is intact, with the file's path or address."""
        found: list[tuple[str, InstalledModel]] = []
        for path in sorted(self.root.glob(f".local/*/{MANIFEST}")):
            with contextlib.suppress(ModelDamaged):
                manifest = read_manifest(path)
                if manifest is not None:
                    model = self._checked(manifest, path.parent, path, thorough=False)
                    found.append((manifest.source, model))
        return sorted(found, key=lambda each: each[0])

    def remove(self, name: str) -> int:
        """Delete a model and what was fetched of it; how many bytes that freed.

        Of a GGUF file, only what was made of it goes.
        """
        folders = self._folders_of(name)
        present = [folder for folder in folders if folder.is_dir()]
        if not present:
            raise ModelMissing(f"{name} is not on this machine; see `pinaivu-node models list`")
        freed = 0
        with self.lock(folders[0].name):
            for folder in present:
                freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                shutil.rmtree(folder)
        return freed

    def folder_of(self, name: str) -> Path:
        """Where the model of this name lies, or would."""
        if not is_model_name(name):
            raise ModelMissing(
                f"{name!r} is no model name; a folder is named by its path (./folder)"
            )
        return self.root / name.replace(":", "@")

    def partial_folder(self, name: str) -> Path:
        """Where it is fetched to before it is complete."""
        return self.root / ".partial" / self.folder_of(name).name

    def local_place(self, path: Path) -> Path:
        """Where what is known of somebody's own folder or file is kept, without suffix."""
        return self._place(str(path.resolve()))

    def hub_place(self, file: HubFileName) -> Path:
        """Where what was made of a GGUF file of the hub lies, or would."""
        return self._place(str(file))

    def _place(self, source: str) -> Path:
        key = hashlib.sha256(source.encode()).hexdigest()[:24]
        return self.root / ".local" / key

    def _folders_of(self, name: str) -> list[Path]:
        if (reference := hub_file(name)) is not None:
            place = self.hub_place(reference)
        elif is_path(name):
            path = Path(name).expanduser()
            place = self.local_place((gguf_in(path) if path.exists() else None) or path)
        else:
            return [self.folder_of(name), self.partial_folder(name)]
        return [place, partial_of(place), self.partial_folder(place.name)]

    @contextlib.contextmanager
    def lock(self, name: str, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold this model alone among all processes; `waiting` is called if another has it.

        The system lets go of the lock when a process dies, however it dies.
        """
        path = self.root / ".locks" / f"{Path(name).name.replace(':', '@')}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def install(self, staging: Path, manifest: Manifest, folder: Path) -> InstalledModel:
        """Put a complete model in its place, in one step; what was there before goes."""
        write_manifest(staging / MANIFEST, manifest)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        staging.replace(folder)
        return _installed(manifest, folder)

    def _checked(
        self, manifest: Manifest, folder: Path, path: Path, *, thorough: bool
    ) -> InstalledModel:
        try:
            current = checked(manifest, folder, thorough=thorough)
        except ModelDamaged as exc:
            named = manifest.name if folder.parent == self.root else manifest.source
            raise ModelDamaged(f"{exc}: run `pinaivu-node models pull {named}`") from exc
        if current is not manifest and os.access(path.parent, os.W_OK):
            write_manifest(path, current)
        return _installed(current, folder)

    def _resolve_converted(
        self, place: Path, source: str, *, size: int | None = None
    ) -> InstalledModel:
        manifest = read_manifest(place / MANIFEST)
        if manifest is None or size not in (None, manifest.weights[0].size):
            raise ModelMissing(
                f"{source} was not converted yet: run `pinaivu-node models pull {source}`"
            )
        return self._checked(manifest, place, place / MANIFEST, thorough=False)

    def _manifest_of(self, model: InstalledModel, name_or_path: str) -> Path:
        own = model.folder / MANIFEST
        if own.exists() or not is_path(name_or_path):
            return own
        return self.local_place(model.folder).with_suffix(".json")

    def _resolve_path(self, path: Path) -> InstalledModel:
        if not path.exists():
            raise ModelMissing(f"there is no {path}")
        gguf = gguf_in(path)
        if gguf is not None:
            return self._resolve_converted(
                self.local_place(gguf), str(path), size=gguf.stat().st_size
            )
        record = self.local_place(path).with_suffix(".json")
        manifest = read_manifest(record)
        if manifest is not None:
            try:
                return self._checked(manifest, path, record, thorough=False)
            except ModelDamaged:
                pass  # its owner changed it, which is her right: look at it anew
        manifest = local_manifest(path)
        write_manifest(record, manifest)
        return _installed(manifest, path)


def partial_of(place: Path) -> Path:
    """Where a conversion is put together before it is complete."""
    return place.with_name(f"{place.name}.partial")


def is_path(name_or_path: str) -> bool:
    """Whether this names a place on disk rather than a model of the catalogue."""
    return (
        "/" in name_or_path
        or os.sep in name_or_path
        or name_or_path.startswith((".", "~"))
        or name_or_path.endswith(".gguf")
    )


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that this path means: itself, or the only one in its folder of weights."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 and not any(path.glob("*.safetensors")) else None


def local_manifest(folder: Path) -> Manifest:
    """What a folder with safetensors weights holds; ModelMissing if it is no such folder."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise ModelMissing(
            f"{folder} holds no model: *.safetensors and config.json are needed, or one .gguf file"
        )
    files = stored_files(folder, model_files(folder))
    by_name = {file.path: file for file in files}
    published = tuple(
        WeightsFile(name=path.name, size=by_name[path.name].size, digest=by_name[path.name].digest)
        for path in weights
    )
    return Manifest(
        name=name_of(folder),
        owner="local",
        licence=LicenceRecord(name="unknown", url=""),
        context_window=context_window_of(folder),
        chat=has_chat_template(folder),
        source=str(folder.resolve()),
        digest=model_digest(published),
        weights=published,
        files=files,
        kind=kind_of(folder),
    )


def model_files(folder: Path) -> list[Path]:
    """The files that make the model of this folder, without what we put beside them."""
    inner = folder.glob("[0-9]_*/config.json")  # how sentence-transformers puts vectors together
    return [
        path for path in (*folder.iterdir(), *inner) if path.is_file() and path.name != MANIFEST
    ]


def kind_of(folder: Path) -> ModelKind:
    """What the model in this folder makes: vectors, if it has a head for nothing else."""
    if (folder / "modules.json").is_file():
        return ModelKind.EMBEDDING
    architectures = _json(folder / "config.json").get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    headless = name.endswith(("Model", "ForMaskedLM")) and not name.endswith("HeadModel")
    return ModelKind.EMBEDDING if headless else ModelKind.TEXT


def name_of(path: Path) -> ModelName:
    """A model name made of a file's or folder's."""
    stem = path.resolve().name.removesuffix(".gguf").lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:64]
    return ModelName(name or "local")


def context_window_of(folder: Path) -> int:
    """How many tokens the model was made for, by its config."""
    config = _json(folder / "config.json")
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        window = part.get("max_position_embeddings")
        if isinstance(window, int) and window > 0:
            return min(window, _turned_alike(part))
    return 2048  # the least that any model of today was made for


def _turned_alike(config: dict[str, Any]) -> int:
    """Up to where all positions turn by one set of angles; the engine goes no further."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return _NO_LIMIT
    name = "original_max_position_embeddings"
    window = rope.get(name) or config.get(name)
    return window if isinstance(window, int) and window > 0 else _NO_LIMIT


def has_chat_template(folder: Path) -> bool:
    """Whether the model knows how a chat is written."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _installed(manifest: Manifest, folder: Path) -> InstalledModel:
    entry = CATALOGUE.get(ModelName(manifest.name))
    shown = Licence(manifest.licence.name, manifest.licence.url)
    return InstalledModel(
        name=ModelName(manifest.name),
        digest=manifest.digest,
        folder=folder,
        context_window=manifest.context_window,
        chat=manifest.chat,
        licence=shown if entry is None else entry.licence,
        owner=manifest.owner,
        bytes_on_disk=sum(file.size for file in manifest.files),
        kind=manifest.kind,
    )
