"""OpenAI's objects of an answer: what all choices share, and each choice as it grows.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pinaivu_gateway.jobs import StreamBroken, TextDelta
from pinaivu_gateway.logprobs import chat_logprobs, completion_logprobs
from pinaivu_gateway.tools import CallsSaid
from pinaivu_node.protocol.ids import Digest, NanoX, RequestId
from pinaivu_node.protocol.inference import Finish
from pinaivu_node.protocol.money import TokenUsage

_FINISH_REASONS: Final = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What all objects of one answer share."""

    request_ids: tuple[RequestId, ...]
    """One for each prompt, since each is a job with a receipt of its own."""
    model: str
    created: int
    is_chat: bool
    model_digest: Digest

    @property
    def request_id(self) -> RequestId:
        """Of the whole: the first."""
        return self.request_ids[0]

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """The fields before `choices`."""
        name = "chat.completion" if self.is_chat else "text_completion"
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {
            "id": prefix + self.request_id.removeprefix("req_"),
            "object": name + (".chunk" if chunk and self.is_chat else ""),
            "created": self.created,
            "model": self.model,
            "service_tier": "default",
            # The digest is all that is known of what ran; the same weights give the same name.
            "system_fingerprint": "fp_" + self.model_digest.removeprefix("sha256:")[:12],
            "request_id": self.request_id,
            **({"request_ids": self.request_ids} if len(self.request_ids) > 1 else {}),
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that was not streamed."""
        return {**self.head(chunk=False), "choices": choices, "usage": usage}


def finish_reason_of(finish: Finish) -> str:
    """As OpenAI calls it.  Raises StreamBroken for ends that its clients know no reason for."""
    reason = _FINISH_REASONS.get(finish)
    if reason is None:
        raise StreamBroken(f"the provider ended the answer early ({finish})")
    return reason


def usage_of(usage: TokenUsage, cost: NanoX) -> dict[str, Any]:
    """OpenAI's usage object: warm prompt tokens are part of the prompt; and what it cost."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "cost": cost,
    }


class Said(NamedTuple):
    """What one delta adds to a choice."""

    text: str
    logprobs: dict[str, Any] | None
    calls: list[dict[str, Any]]


class Choice:
    """One of the answers in a reply; `index` counts through all answers to all prompts."""

    def __init__(
        self,
        index: int,
        request_id: RequestId,
        *,
        is_chat: bool,
        has_logprobs: bool,
        echo: str = "",
    ) -> None:
        """`has_logprobs`: the client asked for them, whatever the provider says of itself."""
        self.index: Final = index
        self.finish: str | None = None
        self._is_chat: Final = is_chat
        self._has_logprobs: Final = has_logprobs
        self._calls: Final = CallsSaid(request_id, choice=index)
        self._echo: Final = echo
        self._offset = len(echo)
        self._kept: list[TextDelta] = []

    @property
    def echo(self) -> str:
        """The prompt, if the answer begins with it."""
        return self._echo

    def keep(self, delta: TextDelta) -> None:
        """Put this aside for `whole`."""
        self._kept.append(delta)

    def take(self, delta: TextDelta) -> Said:
        """What a stream says of this."""
        logprobs = None
        if self._has_logprobs and (delta.logprobs or self._is_chat):
            if self._is_chat:
                logprobs = chat_logprobs(delta.logprobs)
            else:
                logprobs = completion_logprobs(delta.logprobs, offset=self._offset)
                self._offset += sum(map(len, logprobs["tokens"]))
        return Said(delta.text, logprobs, self._calls.deltas(delta.tool_calls))

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that was not streamed: everything that was kept."""
        kept = self._kept
        said = self.take(
            TextDelta(
                "".join(delta.text for delta in kept),
                tuple(token for delta in kept for token in delta.token_ids),
                tuple(each for delta in kept for each in delta.logprobs),
                tuple(call for delta in kept for call in delta.tool_calls),
            )
        )
        content: dict[str, Any] = {"text": self._echo + said.text}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
            calls = self._calls.whole()
            if calls:
                # Without calls the key is absent: clients take its presence for a call.
                message |= {"content": said.text or None, "tool_calls": calls}
            content = {"message": message}
        rest = {"logprobs": said.logprobs, "finish_reason": self.finish}
        return {"index": self.index, **content, **rest}
