"""Weights from the Hugging Face hub, or from any server that speaks its HTTP API.

The hub says what a repository holds at a commit, with the SHA-256 of every large file; each file is
fetched under that commit and must have that hash.  What came before the connection broke, or the
process died, is kept under the hash's name, and the rest is asked for.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx

from pinaivu_node.models.catalogue import HubSource
from pinaivu_node.models.errors import PullFailed
from pinaivu_node.models.manifest import MANIFEST
from pinaivu_node.models.progress import Progress

_WANTED: Final = re.compile(
    r"[A-Za-z0-9._ -]+\.(safetensors|json|jinja|txt|model|md)|LICEN[CS]E[A-Za-z0-9._-]*"
)
"""Weights, tokenizer, licence; never code, and nothing in folders (other formats of the same)."""
_CONSOLIDATED: Final = re.compile(r"consolidated.*\.safetensors")
"""A second copy of the weights in their maker's own layout."""
_RETRIES: Final = 5
"""Attempts in a row that bring no byte.  With the pauses between them, half a minute offline."""
_CHUNK: Final = 2**20
_MAX_FILES: Final = 200
"""No repository of the catalogue has fifty files that match."""
_SHOWN: Final = 40
"""Names of files in a message; makers of GGUF files offer two dozen kinds of one model."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file at a commit."""

    name: str
    size: int
    sha256: str | None
    """Of a large file; a small one is named by its git hash."""
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a repository holds at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


class Hub:
    """A hub to fetch from.  The caller owns the HTTP client."""

    def __init__(
        self,
        client: httpx.Client,
        *,
        endpoint: str,
        token: str | None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._endpoint = endpoint.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._pause = pause

    def snapshot(self, source: HubSource) -> Snapshot:
        """The files that are needed of this repository, at the commit its revision is now."""
        revision = quote(source.revision, safe="")
        url = f"{self._endpoint}/api/models/{source.repo}/revision/{revision}"
        try:
            response = self._client.get(url, params={"blobs": "true"}, headers=self._headers)
            self._check(response, source.repo)
            return _snapshot(source, response.json())
        except httpx.HTTPError as exc:
            raise PullFailed(f"the hub cannot be reached: {exc!r}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise PullFailed(f"the hub's answer about {source.repo} is unreadable: {exc}") from exc

    def fetch(self, snapshot: Snapshot, file: HubFile, folder: Path, *, progress: Progress) -> None:
        """Bring one file into the folder, going on where an earlier attempt stopped."""
        target = folder / file.name
        if target.is_file() and target.stat().st_size == file.size:
            return  # its hash was checked before it got this name
        partial = folder / f"{file.name}.{(file.sha256 or file.git_sha1 or '')[:16]}.partial"
        url = f"{self._endpoint}/{snapshot.repo}/resolve/{snapshot.commit}/{quote(file.name)}"
        progress.step(f"fetching {file.name}", total=file.size)
        failures = 0
        while (have := _size(partial)) < file.size:
            try:
                self._append(url, partial, file=file, repo=snapshot.repo, progress=progress)
            except httpx.TransportError as exc:
                failures = 0 if _size(partial) > have else failures + 1
                if failures >= _RETRIES:
                    raise PullFailed(
                        f"the connection broke while fetching {file.name} ({exc}); "
                        "pull again, it goes on from there"
                    ) from exc
                self._pause(2.0**failures)
        self._accept(partial, target, file)

    def _append(
        self, url: str, partial: Path, *, file: HubFile, repo: str, progress: Progress
    ) -> None:
        have = _size(partial)
        headers = self._headers | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._client.stream("GET", url, headers=headers) as response:
            self._check(response, repo)
            # A server that ignores the range sends everything: begin anew.
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
            done = have if resumed else 0
            with partial.open("ab" if resumed else "wb") as out:
                # As it comes: a chunk size would hold back, and lose, what came before a break.
                for chunk in response.iter_bytes():
                    done += len(chunk)
                    if done > file.size:
                        break
                    out.write(chunk)
                    progress.advance(done)
        if done > file.size:
            partial.unlink()
            raise PullFailed(f"the server sends more of {file.name} than the hub says there is")
        if done == have:
            raise httpx.RemoteProtocolError("the server sent nothing")

    def _accept(self, partial: Path, target: Path, file: HubFile) -> None:
        if not partial.exists():
            partial.touch()  # a file of no bytes
        found, wanted = _hashes(partial, file)
        if found != wanted:
            partial.unlink()
            raise PullFailed(
                f"{file.name} came damaged (hash {found[:16]}…, the hub says {wanted[:16]}…) and "
                "was deleted; pull again"
            )
        partial.replace(target)

    def _check(self, response: httpx.Response, repo: str) -> None:
        status = response.status_code
        if status in (401, 403):
            raise PullFailed(
                f"{repo} is gated: accept its terms on its page at {self._endpoint}/{repo}, make "
                "an access token in your account there, and pull again with HF_TOKEN set"
            )
        if status == 404:
            raise PullFailed(f"there is no {repo} at {self._endpoint} (HF_ENDPOINT?)")
        if status in (408, 429) or status >= 500:
            raise httpx.RemoteProtocolError(f"status {status}")
        if not response.is_success:
            raise PullFailed(f"the hub answers status {status} for {repo}")


def _snapshot(source: HubSource, answer: Any) -> Snapshot:
    repo, commit = source.repo, str(answer["sha"])
    if re.fullmatch(r"[0-9a-f]{40}", commit) is None:
        raise ValueError("no commit")
    rows = {str(row["rfilename"]): row for row in answer["siblings"]}
    if source.file is not None:
        if source.file not in rows or not source.file.endswith(".gguf"):
            raise PullFailed(_no_such_file(source, rows))
        return Snapshot(repo, commit, (_hub_file(rows[source.file]),))
    wanted = [row for name, row in rows.items() if _is_wanted(name)]
    if len(wanted) > _MAX_FILES:
        raise ValueError(f"{len(wanted)} files")
    # The small ones first: what is wrong with a repository shows before the gigabytes.
    files = tuple(sorted(map(_hub_file, wanted), key=lambda file: (file.size, file.name)))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise PullFailed(f"{repo} has no safetensors weights")
    return Snapshot(repo, commit, files)


def _no_such_file(source: HubSource, names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.endswith(".gguf") and "/" not in name)
    if not files:
        return f"{source.repo} has no GGUF files"
    shown = ", ".join(files[:_SHOWN]) + (", …" if len(files) > _SHOWN else "")
    said = f"has no GGUF file {source.file}" if source.file else "has several files"
    return f"{source.repo} {said}: name one as hf.co/{source.repo}/FILE, of {shown}"


def _is_wanted(name: str) -> bool:
    if name == MANIFEST:
        return False  # ours goes there
    return _WANTED.fullmatch(name) is not None and _CONSOLIDATED.fullmatch(name) is None


def _hub_file(row: Any) -> HubFile:
    lfs = row.get("lfs")
    sha256 = None if lfs is None else str(lfs["sha256"])
    if sha256 is not None and _SHA256.fullmatch(sha256) is None:
        raise ValueError(f"no sha256 for {row['rfilename']}")
    return HubFile(
        name=str(row["rfilename"]),
        size=int(row["size"] if lfs is None else lfs["size"]),
        sha256=sha256,
        git_sha1=None if row.get("blobId") is None else str(row["blobId"]),
    )


def _hashes(path: Path, file: HubFile) -> tuple[str, str]:
    """The hash that the file has, and the one it should have."""
    if file.sha256 is not None:
        running, wanted = hashlib.sha256(), file.sha256
    elif file.git_sha1 is not None:
        # A git blob's name: SHA-1 over a header and the bytes.  Not for trust; it finds damage.
        running, wanted = hashlib.sha1(usedforsecurity=False), file.git_sha1
        running.update(b"blob %d\0" % file.size)
    else:
        return "", ""
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK):
            running.update(chunk)
    return running.hexdigest(), wanted


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
