"""What lies beside a model's files and says what they are: `manifest.json`.

The digest is of the weights as their owner published them, also where they were converted here, so
it is the same on every machine.  The converted files have their own checksums below it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, Field, ValidationError

from pinaivu_node.models.catalogue import ModelKind
from pinaivu_node.models.errors import ModelDamaged
from pinaivu_node.protocol.ids import Digest, DigestField

MANIFEST: Final = "manifest.json"
_CHUNK: Final = 2**20
Advance = Callable[[int], None]
"""Told how many bytes are done."""


class _Record(BaseModel, frozen=True, extra="forbid"):
    pass


class WeightsFile(_Record):
    """A file of weights as published."""

    name: str
    size: int = Field(ge=0)
    digest: DigestField


class StoredFile(_Record):
    """A file of the folder.  Size and time tell cheaply that it was not touched since."""

    path: str
    size: int = Field(ge=0)
    modified_ns: int
    digest: DigestField


class LicenceRecord(_Record):
    """The licence as it was shown when the model came."""

    name: str
    url: str


class Manifest(_Record):
    """What a model folder holds."""

    version: Literal[1] = 1
    name: str
    owner: str
    licence: LicenceRecord
    context_window: int = Field(ge=1)
    chat: bool
    source: str
    """Where it came from, for a person to read."""
    digest: DigestField
    weights: tuple[WeightsFile, ...] = Field(min_length=1)
    files: tuple[StoredFile, ...] = Field(min_length=1)
    kind: ModelKind = ModelKind.TEXT


def model_digest(weights: Sequence[WeightsFile]) -> Digest:
    """The digest that names a model: that of its one weights file, or of the list of several.

    The list is what `sha256sum` prints for the files in order of their names.
    """
    if len(weights) == 1:
        return weights[0].digest
    lines = (
        f"{file.digest.removeprefix('sha256:')}  {file.name}\n"
        for file in sorted(weights, key=lambda file: file.name)
    )
    return Digest("sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest())


def file_digest(path: Path, *, advance: Advance | None = None) -> Digest:
    """The SHA-256 of a file's bytes."""
    running = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            running.update(chunk)
            done += len(chunk)
            if advance is not None:
                advance(done)
    return Digest("sha256:" + running.hexdigest())


def stored_files(folder: Path, paths: Iterable[Path]) -> tuple[StoredFile, ...]:
    """Records of these files as they are now, hashed."""
    return tuple(_stored(folder, path) for path in sorted(paths))


def _stored(folder: Path, path: Path) -> StoredFile:
    status = path.stat()
    return StoredFile(
        path=path.relative_to(folder).as_posix(),
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        digest=file_digest(path),
    )


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, None if there is none; ModelDamaged if it cannot be read."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        raise ModelDamaged(f"{path} cannot be read: {exc}") from exc


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put the manifest there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    temporary.replace(path)


def checked(manifest: Manifest, folder: Path, *, thorough: bool = False) -> Manifest:
    """The manifest, with new file times if files were copied; ModelDamaged if bytes changed.

    Unless `thorough`, a file whose size and time are as recorded is taken to be unchanged.
    """
    files = tuple(_checked(file, folder, thorough=thorough) for file in manifest.files)
    return manifest if files == manifest.files else manifest.model_copy(update={"files": files})


def _checked(file: StoredFile, folder: Path, *, thorough: bool) -> StoredFile:
    path = folder / file.path
    try:
        status = path.stat()
        unchanged = (status.st_size, status.st_mtime_ns) == (file.size, file.modified_ns)
        if unchanged and not thorough:
            return file
        if status.st_size != file.size or file_digest(path) != file.digest:
            raise ModelDamaged(f"{path} is not what it was when the model was pulled")
    except OSError as exc:
        raise ModelDamaged(f"{path} cannot be read: {exc}") from exc
    return file.model_copy(update={"modified_ns": status.st_mtime_ns})
