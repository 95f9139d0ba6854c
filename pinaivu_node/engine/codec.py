"""Requests and answers as rows of plain values, which msgpack can write, and back again.

An event is written for every token of every request, so its row is cut off after the last field
that says anything, and a token's logprobs are three columns instead of a list of records.  What
reads a row checks every type in it: it fails with TypeError, ValueError or KeyError, whatever
the row.  Of a request's sampling only the names are: `limits.py` looks at the values.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pinaivu_node.engine.types import (
    Alternative,
    ChatMessage,
    Constraint,
    ConstraintKind,
    EmbeddingRequest,
    Embeddings,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

Row = Sequence[Any]

_INTEGERS: Final = frozenset({int})
_BYTES: Final = frozenset({bytes})
_NUMBERS: Final = frozenset({float, int})
_SAMPLING_FIELDS: Final = tuple(field.name for field in dataclasses.fields(SamplingParams))
_FINISH: Final = {reason.value: reason for reason in FinishReason}
_REASONS: Final = {reason: reason.value for reason in FinishReason} | {None: None}

# -- events -----------------------------------------------------------------------------------


def event_row(event: TokenEvent) -> Row:
    """The event, without the fields at its end that say nothing."""
    begin = (event.request_id, event.token_ids, event.text, event.input_tokens)
    if event.finish_reason is not None or event.logprobs or event.tool_calls or event.error:
        return (
            *begin,
            event.cached_tokens,
            event.index,
            _REASONS[event.finish_reason],
            event.error,
            [(d.index, d.id, d.name, d.arguments) for d in event.tool_calls],
            [_logprob_row(each) for each in event.logprobs],
        )
    if event.index:
        return (*begin, event.cached_tokens, event.index)
    return (*begin, event.cached_tokens) if event.cached_tokens else begin


def event_of(row: Row) -> TokenEvent:
    """The event that this row says."""
    request_id, token_ids, text, input_tokens, *more = row
    if type(token_ids) is not tuple or not _INTEGERS.issuperset(map(type, token_ids)):
        raise TypeError("token ids that are none")
    begin = (_text(request_id), token_ids, _text(text), _integer(input_tokens))
    match more:
        case []:
            return TokenEvent(*begin)
        case [cached]:
            return TokenEvent(*begin, _integer(cached))
        case [cached, index]:
            return TokenEvent(*begin, _integer(cached), index=_integer(index))
        case [cached, index, reason, error, calls, logprobs]:
            return TokenEvent(
                *begin,
                _integer(cached),
                finish_reason=None if reason is None else _FINISH[reason],
                error=_optional_text(error),
                index=_integer(index),
                tool_calls=tuple(_delta_of(call) for call in calls),
                logprobs=tuple(_logprob_of(each) for each in logprobs),
            )
        case _:
            raise ValueError(f"an event of {len(row)} fields")


def _logprob_row(logprob: TokenLogprob) -> Row:
    all_of_them = (logprob.chosen, *logprob.top)
    return (
        [each.token_id for each in all_of_them],
        [each.token for each in all_of_them],
        [each.logprob for each in all_of_them],
    )


def _logprob_of(row: Row) -> TokenLogprob:
    token_ids, tokens, logprobs = row
    if not (
        _INTEGERS.issuperset(map(type, token_ids))
        and _BYTES.issuperset(map(type, tokens))
        and _NUMBERS.issuperset(map(type, logprobs))
        and len(token_ids) == len(tokens) == len(logprobs)
    ):
        raise TypeError("logprobs that are none")
    chosen, *top = map(Alternative, token_ids, tokens, logprobs)
    return TokenLogprob(chosen, tuple(top))


def _delta_of(row: Row) -> ToolCallDelta:
    index, call_id, name, arguments = row
    return ToolCallDelta(
        _integer(index), _optional_text(call_id), _optional_text(name), _text(arguments)
    )


# -- requests ---------------------------------------------------------------------------------


def request_row(request: GenerationRequest) -> Row:
    """The request, whole."""
    match request.prompt:
        case str(text):
            prompt: Any = text
        case tuple(parts):
            prompt = [
                _message_row(part) if isinstance(part, ChatMessage) else part for part in parts
            ]
        case _:
            raise TypeError(f"a prompt that is a {type(request.prompt).__name__}")
    # Any mapping and any integer may be asked for; noise takes the low 64 bits of a seed anyway.
    sampling = dataclasses.replace(
        request.sampling,
        logit_bias=dict(request.sampling.logit_bias),
        seed=request.sampling.seed & (2**64 - 1),
    )
    constraint = request.constraint
    return (
        request.id,
        prompt,
        [getattr(sampling, name) for name in _SAMPLING_FIELDS],
        request.resume_token_ids,
        request.tenant,
        request.deadline_ms,
        None if constraint is None else (constraint.kind.value, constraint.text),
        None if request.tools is None else _tools_row(request.tools),
    )


def request_of(row: Row) -> GenerationRequest:
    """The request that this row says."""
    request_id, prompt, sampling, resume, tenant, deadline, constraint, tools = row
    return GenerationRequest(
        id=_text(request_id),
        prompt=_prompt_of(prompt),
        sampling=SamplingParams(**dict(zip(_SAMPLING_FIELDS, sampling, strict=True))),
        resume_token_ids=_integers(resume),
        tenant=bytes(tenant),
        deadline_ms=None if deadline is None else _integer(deadline),
        constraint=None if constraint is None else _constraint_of(constraint),
        tools=None if tools is None else _tools_of(tools),
    )


def _message_row(message: ChatMessage) -> Row:
    return (
        message.role,
        message.content,
        [(call.id, call.name, call.arguments) for call in message.tool_calls],
        message.tool_call_id,
    )


def _message_of(row: Row) -> ChatMessage:
    role, content, calls, answered = row
    return ChatMessage(
        _text(role),
        _text(content),
        tuple(ToolCall(*map(_text, call)) for call in calls),
        _text(answered),
    )


def _prompt_of(prompt: Any) -> tuple[ChatMessage, ...] | str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], tuple):
        return tuple(_message_of(row) for row in prompt)
    return _integers(prompt)


def _constraint_of(row: Row) -> Constraint:
    kind, text = row
    return Constraint(ConstraintKind(kind), _text(text))


def _tools_row(use: ToolUse) -> Row:
    tools = [(tool.name, tool.description, tool.parameters) for tool in use.tools]
    return (tools, use.choice.value, use.named, use.parallel)


def _tools_of(row: Row) -> ToolUse:
    tools, choice, named, parallel = row
    return ToolUse(
        tools=tuple(Tool(*map(_text, tool)) for tool in tools),
        choice=ToolChoice(choice),
        named=_optional_text(named),
        parallel=bool(parallel),
    )


# -- embeddings -------------------------------------------------------------------------------


def embedding_request_row(request: EmbeddingRequest) -> Row:
    """The request, whole."""
    return (request.id, request.inputs, request.deadline_ms)


def embedding_request_of(row: Row) -> EmbeddingRequest:
    """The request that this row says."""
    request_id, inputs, deadline = row
    return EmbeddingRequest(
        id=_text(request_id),
        inputs=tuple(each if isinstance(each, str) else _integers(each) for each in inputs),
        deadline_ms=None if deadline is None else _integer(deadline),
    )


def embeddings_row(embeddings: Embeddings) -> Row:
    """Vectors in single precision, which is what they are computed in."""
    return ([array("f", each).tobytes() for each in embeddings.vectors], embeddings.input_tokens)


def embeddings_of(row: Row) -> Embeddings:
    """The vectors that this row says."""
    vectors, input_tokens = row
    return Embeddings(tuple(_vector_of(each) for each in vectors), _integer(input_tokens))


def _vector_of(data: bytes) -> tuple[float, ...]:
    if not isinstance(data, bytes):
        raise TypeError("a vector that is none")
    vector = array("f")
    vector.frombytes(data)
    return tuple(vector)


# -- single values ----------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"an integer expected, not {type(value).__name__}")
    return value


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(values)
    if not _INTEGERS.issuperset(map(type, found)):
        raise TypeError("a token id is no integer")
    return found
