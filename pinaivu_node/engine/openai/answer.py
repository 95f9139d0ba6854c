"""What the chunks of an OpenAI-compatible server's stream mean: pure, chunks in and events out.

Such a server gives text and, at the end, counts; it gives no token ids.  So the ids here are
positions in the answer, 0, 1, 2, …: their number is right, their values mean nothing.  They are
given out one per logprob where there are logprobs, else one per chunk, or as many as the server's
running count says where it sends one; the last events bring those that the final count still lacks.
An alternative in a logprob has the id of the token in whose place it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from pinaivu_node.engine.types import (
    Alternative,
    ConstraintKind,
    EngineDead,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
    ToolChoice,
)

_FINISH: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.STOP,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}
_UNREADABLE: Final = (
    *(ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(OverflowError, RecursionError),  # an index of Infinity, a chunk nested too deeply
)
"""What looking into a chunk of the wrong shape can raise."""
_MAX_CHECKED: Final = 2**22
"""Characters of an answer that are kept to see whether they are JSON; no window is larger."""
_ERROR_CHARACTERS: Final = 500


class _Choice:
    """One of the answers."""

    def __init__(self) -> None:
        self.given = 0
        self.finish: FinishReason | None = None
        self.calls_a_tool = False
        self.has_logprobs = False
        self.has_text = False
        self.kept: list[str] = []
        self.kept_characters = 0


class ServerAnswer:
    """The answers to one request, as far as the server has told them."""

    def __init__(self, request: GenerationRequest) -> None:
        self.input_tokens = 0
        self.cached_tokens = 0
        self.is_over = False
        self._request = request
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._counted: int | None = None
        """Tokens of all answers by the server's own count, once it told one."""

    def read(self, data: bytes) -> list[TokenEvent]:
        """What a chunk says that is new.

        EngineDead if it says nothing that could be understood; the stream is then of no use.
        """
        try:
            return list(self._events(json.loads(data)))
        except _UNREADABLE as exc:
            raise EngineDead(f"the server's stream is unreadable: {exc!r}") from exc

    def end(self) -> list[TokenEvent]:
        """The last event of every answer; EngineDead if the stream ended before them."""
        if any(choice.finish is None for choice in self._choices):
            raise EngineDead("the server broke off its answer")
        self.is_over = True
        return [self._last_event(index) for index in range(len(self._choices))]

    # -- chunks ------------------------------------------------------------------------------------

    def _events(self, chunk: dict[str, Any]) -> Iterator[TokenEvent]:
        if error := chunk.get("error"):
            self.is_over = True
            text = error.get("message", error) if isinstance(error, dict) else error
            for index in range(len(self._choices)):
                yield self._event(
                    index, finish=FinishReason.ERROR, error=str(text)[:_ERROR_CHARACTERS]
                )
            return
        if usage := chunk.get("usage"):
            self._count(usage)
        for said in chunk.get("choices") or ():
            event = self._choice_event(said)
            if event is not None:
                yield event

    def _count(self, usage: dict[str, Any]) -> None:
        self.input_tokens = max(0, int(usage["prompt_tokens"]))
        # What is paid for is bounded by what was asked for, and so is the number of ids here.
        sampling = self._request.sampling
        self._counted = min(int(usage["completion_tokens"]), sampling.max_tokens * sampling.n)
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = max(0, int(details.get("cached_tokens") or 0))

    def _choice_event(self, said: dict[str, Any]) -> TokenEvent | None:
        index = int(said.get("index") or 0)
        if index < 0:
            raise ValueError(f"answer {index}")
        choice = self._choices[index]
        delta = said["delta"] if "delta" in said else {"content": said["text"]}
        text = _whole(str(delta.get("content") or ""))
        calls = tuple(_delta(call, at) for at, call in enumerate(delta.get("tool_calls") or ()))
        if reason := said.get("finish_reason"):
            choice.finish = _FINISH.get(reason, FinishReason.STOP)
        choice.calls_a_tool |= bool(calls)
        choice.has_text |= bool(text)
        self._keep(choice, text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._request.sampling.logprobs is not None:
            logprobs = tuple(_logprobs(said.get("logprobs") or {}, first_id=choice.given))
            choice.has_logprobs |= bool(logprobs)
        if not (text or calls or logprobs):
            return None
        return self._event(index, text=text, calls=calls, logprobs=logprobs)

    def _keep(self, choice: _Choice, text: str) -> None:
        if self._request.constraint is None:
            return
        choice.kept_characters += len(text)
        if choice.kept_characters <= _MAX_CHECKED:
            choice.kept.append(text)

    # -- events ------------------------------------------------------------------------------------

    def _event(
        self,
        index: int,
        *,
        text: str = "",
        calls: tuple[ToolCallDelta, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish: FinishReason | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        choice = self._choices[index]
        first = choice.given
        choice.given = max(first, self._due(choice, logprobs, says=bool(text or calls)))
        return TokenEvent(
            request_id=self._request.id,
            token_ids=tuple(range(first, choice.given)),
            text=text,
            input_tokens=self.input_tokens,
            cached_tokens=self.cached_tokens,
            finish_reason=finish,
            error=error,
            index=index,
            logprobs=logprobs,
            tool_calls=calls,
        )

    def _due(self, choice: _Choice, logprobs: tuple[TokenLogprob, ...], *, says: bool) -> int:
        """How many ids this answer should have been given by now."""
        if choice.has_logprobs:
            return choice.given + len(logprobs)
        if len(self._choices) == 1 and self._counted is not None:
            return self._counted
        if self.is_over:
            return choice.given + self._missing(choice)
        # Of several answers some servers count the one in the chunk, others all of them.
        return choice.given + says

    def _missing(self, choice: _Choice) -> int:
        """This answer's share of the tokens that the final count has and nobody was given."""
        if self._counted is None:
            return 0
        # Those before this one have taken theirs already.
        behind = len(self._choices) - self._choices.index(choice)
        lacking = self._counted - sum(each.given for each in self._choices)
        return max(0, -(-lacking // behind))

    def _last_event(self, index: int) -> TokenEvent:
        choice = self._choices[index]
        finish = choice.finish
        if finish is FinishReason.STOP and choice.calls_a_tool:
            finish = FinishReason.TOOL_CALLS  # some say "stop" after a call that was demanded
        if error := self._broken_promise(choice):
            return self._event(index, finish=FinishReason.ERROR, error=error)
        return self._event(index, finish=finish)

    def _broken_promise(self, choice: _Choice) -> str:
        """What the server was asked for and has ignored; empty if nothing."""
        sampling, tools = self._request.sampling, self._request.tools
        if sampling.logprobs is not None and choice.has_text and not choice.has_logprobs:
            return "the server reports no logprobs"
        if choice.finish is FinishReason.LENGTH:
            return ""  # what was cut off need not be whole
        if tools is not None and tools.choice is ToolChoice.REQUIRED and not choice.calls_a_tool:
            return "the server called no tool, though it had to"
        if self._request.constraint is not None and not choice.calls_a_tool:
            is_object = self._request.constraint.kind is ConstraintKind.JSON_OBJECT
            if not _is_json(choice, is_object=is_object):
                return "the server's answer is not the JSON that it had to be"
        return ""


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_json(choice: _Choice, *, is_object: bool) -> bool:
    if choice.kept_characters > _MAX_CHECKED:
        return False
    try:
        value = json.loads("".join(choice.kept))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or not is_object


def _delta(call: dict[str, Any], at: int) -> ToolCallDelta:
    function = call.get("function") or {}
    index = call.get("index")
    call_id, name = call.get("id"), function.get("name")
    index = at if index is None else int(index)
    if index < 0:
        raise ValueError(f"call {index}")
    return ToolCallDelta(
        index=index,
        id=None if call_id is None else str(call_id),
        name=None if name is None else str(name),
        arguments=str(function.get("arguments") or ""),
    )


def _logprobs(said: dict[str, Any], *, first_id: int) -> Iterator[TokenLogprob]:
    if "content" in said:  # of a chat
        for token_id, row in enumerate(said["content"] or (), start=first_id):
            top = tuple(_alternative(token_id, each) for each in row.get("top_logprobs") or ())
            yield TokenLogprob(_alternative(token_id, row), top)
        return
    tokens = said.get("tokens") or ()
    tops = said.get("top_logprobs") or [{}] * len(tokens)
    rows = zip(tokens, said.get("token_logprobs") or (), tops, strict=True)
    for token_id, (token, logprob, top) in enumerate(rows, start=first_id):
        others = sorted((top or {}).items(), key=lambda item: -float(item[1]))
        yield TokenLogprob(
            Alternative(token_id, _token_bytes(token), float(logprob)),
            tuple(Alternative(token_id, _token_bytes(t), float(p)) for t, p in others),
        )


def _alternative(token_id: int, row: dict[str, Any]) -> Alternative:
    raw = row.get("bytes")
    token = _token_bytes(row["token"]) if raw is None else bytes(raw)
    return Alternative(token_id, token, float(row["logprob"]))


def _token_bytes(token: str) -> bytes:
    r"""A token as text; OpenAI writes one that is no text as `bytes:\xe2\x80`."""
    prefix, _, digits = token.partition(":")
    if prefix == "bytes" and digits.startswith("\\x"):
        return bytes.fromhex(digits.replace("\\x", ""))
    return token.encode()
