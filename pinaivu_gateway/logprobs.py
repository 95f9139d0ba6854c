"""OpenAI's logprobs objects, of what an engine reported beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pinaivu_node.protocol.inference import Likelihood, TokenLogprob


def chat_logprobs(reported: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a choice or of a chunk.  A token's bytes may be a part of a character."""
    content = [
        {**_entry(each.chosen), "top_logprobs": [_entry(other) for other in each.top]}
        for each in reported
    ]
    return {"content": content, "refusal": None}


def _entry(likelihood: Likelihood) -> dict[str, Any]:
    _, token, logprob = likelihood
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}
