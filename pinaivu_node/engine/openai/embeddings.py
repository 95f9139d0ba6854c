"""What to post to an OpenAI-compatible server for an embedding, and how to read its answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Final

from pinaivu_node.engine.types import EmbeddingRequest, Embeddings, EngineDead, PromptRefused

_PORTION: Final = 32
"""Inputs posted at once: the smallest bound that such servers come with."""
_MAX_INPUTS: Final = 2048
"""As OpenAI's own bound."""


def embedding_bodies(
    request: EmbeddingRequest, *, model: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where to post, and what, one after the other; PromptRefused before the first."""
    if not 1 <= len(request.inputs) <= _MAX_INPUTS:
        raise PromptRefused(f"1 to {_MAX_INPUTS} texts can be embedded at once.")
    if len({isinstance(each, str) for each in request.inputs}) > 1:
        raise PromptRefused("Either texts or token ids can be embedded, not both at once.")
    for at in range(0, len(request.inputs), _PORTION):
        inputs = [
            each if isinstance(each, str) else list(each)
            for each in request.inputs[at : at + _PORTION]
        ]
        yield "embeddings", {"model": model, "input": inputs, "encoding_format": "float"}


def read_embeddings(data: bytes, *, count: int) -> Embeddings:
    """So many vectors, of unit length, in the order of their inputs; EngineDead if it is not."""
    try:
        answer = json.loads(data)
        rows = {int(row["index"]): row["embedding"] for row in answer["data"]}
        vectors = tuple(_unit(rows[index]) for index in range(count))
        return Embeddings(vectors, int((answer.get("usage") or {}).get("prompt_tokens") or 0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise EngineDead(f"the server's embeddings are unreadable: {exc!r}") from exc


def _unit(row: list[Any]) -> tuple[float, ...]:
    vector = [float(each) for each in row]
    length = math.hypot(*vector)
    if not (0.0 < length < math.inf):
        raise ValueError(f"a vector of length {length}")
    return tuple(each / length for each in vector)
