"""A GGUF file on the hub, by what people pass on: its address, or `hf.co/owner/repository/file`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE: Final = re.compile(
    rf"(?:https://)?(?:www\.)?(?:hf\.co|huggingface\.co)/(?P<repo>{_NAME}/{_NAME})"
    rf"(?:/(?:resolve|blob)/(?P<revision>{_NAME}))?(?:/(?P<file>{_NAME}))?/?(?:\?download=true)?"
)


@dataclass(frozen=True, slots=True)
class HubFileName:
    """A file of a repository; without a name, it is still to be chosen."""

    repo: str
    file: str
    revision: str = "main"

    def __str__(self) -> str:
        if self.revision == "main":
            return f"hf.co/{self.repo}/{self.file}".rstrip("/")
        return f"hf.co/{self.repo}/resolve/{self.revision}/{self.file}".rstrip("/")


def hub_file(name: str) -> HubFileName | None:
    """What on the hub is meant; None if this is no address there."""
    match = _REFERENCE.fullmatch(name)
    if match is None:
        return None
    return HubFileName(match["repo"], match["file"] or "", match["revision"] or "main")
