"""OpenAI's logprobs objects, of what an engine reported beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pinaivu_node.protocol.inference import Likelihood, TokenLogprob


def chat_logprobs(reported: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a choice or of a chunk.  A token's bytes may be a part of a character."""
    content = [
        {**_entry(each.chosen), "top_logprobs": [_entry(other) for other in each.top]}
        for each in reported
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(reported: Sequence[TokenLogprob], *, offset: int) -> dict[str, Any]:
    """The same in the form of raw completions; `offset` is where in the text the tokens begin."""
    tokens = [_text_of(each.chosen) for each in reported]
    return {
        "tokens": tokens,
        "token_logprobs": [each.chosen[2] for each in reported],
        "top_logprobs": [{_text_of(it): it[2] for it in reversed(each.top)} for each in reported],
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }


def _text_of(likelihood: Likelihood) -> str:
    return likelihood[1].decode(errors="replace")


def _entry(likelihood: Likelihood) -> dict[str, Any]:
    _, token, logprob = likelihood
    return {"token": _text_of(likelihood), "logprob": logprob, "bytes": list(token)}
