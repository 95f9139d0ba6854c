from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.openai.answer import ServerAnswer
from pinaivu_node.engine.types import (
    Alternative,
    ChatMessage,
    Constraint,
    ConstraintKind,
    EngineDead,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tool,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

HELLO = (ChatMessage("user", "hello"),)
AN_OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
ANY_JSON = Constraint(ConstraintKind.JSON_SCHEMA, "{}")
MUST_CALL = ToolUse((Tool("clock"),), ToolChoice.REQUIRED)


def an_answer(*, constraint=None, tools=None, **sampling) -> ServerAnswer:
    params = SamplingParams(**({"max_tokens": 70} | sampling))
    return ServerAnswer(GenerationRequest("r", HELLO, params, constraint=constraint, tools=tools))


def said(answer: ServerAnswer, *choices, **chunk):
    return answer.read(json.dumps({"choices": choices} | chunk).encode())


def delta(content=None, *, index=0, finish=None, logprobs=None, **more):
    return {
        "index": index,
        "delta": {"content": content} | more,
        "finish_reason": finish,
        "logprobs": logprobs,
    }


def ids_of(events) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_a_chats_logprobs_say_how_many_tokens_a_chunk_has():
    answer = an_answer(logprobs=1)
    row = {"token": "é", "bytes": [195, 169], "logprob": -0.5}
    rows = [row | {"top_logprobs": [row, {"token": "e", "logprob": -1.5}]}, row]
    (event,) = said(answer, delta("éé", logprobs={"content": rows}))
    assert event.token_ids == (0, 1)
    first, second = event.logprobs
    assert first.chosen == Alternative(0, b"\xc3\xa9", -0.5)
    assert [each.token for each in first.top] == [b"\xc3\xa9", b"e"]
    assert (second.chosen.token_id, second.top) == (1, ())
    said(answer, delta(finish="stop"))
    said(answer, usage={"prompt_tokens": 3, "completion_tokens": 9})
    (last,) = answer.end()
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.STOP)


def test_a_completions_logprobs_are_read_too():
    answer = an_answer(logprobs=2)
    logprobs = {
        "tokens": ["a", "bytes:\\xc3"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"b": -2.0, "a": -0.5}, None],
    }
    (event,) = said(answer, {"index": 0, "text": "a", "logprobs": logprobs})
    assert [each.chosen.token for each in event.logprobs] == [b"a", b"\xc3"]
    assert [each.token for each in event.logprobs[0].top] == [b"a", b"b"]


def test_a_server_that_keeps_its_logprobs_to_itself_is_not_believed():
    answer = an_answer(logprobs=0)
    said(answer, delta("a", finish="stop"))
    (last,) = answer.end()
    assert (last.finish_reason, last.error) == (
        FinishReason.ERROR,
        "the server reports no logprobs",
    )


def test_tool_calls_come_in_pieces_and_end_as_such():
    answer = an_answer(tools=MUST_CALL)
    begin = {"index": 0, "id": "c1", "function": {"name": "clock", "arguments": ""}}
    (first,) = said(answer, delta(tool_calls=[begin]))
    (second,) = said(answer, delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]))
    assert first.tool_calls == (ToolCallDelta(0, "c1", "clock"),)
    assert second.tool_calls == (ToolCallDelta(0, arguments="{}"),)
    said(answer, delta(finish="stop"))
    said(answer, usage={"prompt_tokens": 3, "completion_tokens": 5})
    (last,) = answer.end()
    assert last.finish_reason is FinishReason.TOOL_CALLS
    assert ids_of([first, second, last]) == [0, 1, 2, 3, 4]


def test_calls_without_a_number_are_numbered_in_their_order():
    calls = [{"id": n, "function": {"name": n, "arguments": "{}"}} for n in "ab"]
    (event,) = said(an_answer(), delta(tool_calls=calls))
    assert [call.index for call in event.tool_calls] == [0, 1]


@pytest.mark.parametrize(
    ("options", "text", "finish", "ends"),
    [
        ({"tools": MUST_CALL}, "noon", "stop", FinishReason.ERROR),
        ({"tools": MUST_CALL}, "no", "length", FinishReason.LENGTH),
        ({"constraint": AN_OBJECT}, "{}", "stop", FinishReason.STOP),
        ({"constraint": AN_OBJECT}, "[]", "stop", FinishReason.ERROR),
        ({"constraint": AN_OBJECT}, "{", "length", FinishReason.LENGTH),
        ({"constraint": ANY_JSON}, "[]", "stop", FinishReason.STOP),
        ({"constraint": ANY_JSON}, "Sure!", "stop", FinishReason.ERROR),
    ],
)
def test_a_promise_that_the_server_breaks_is_an_error(options, text, finish, ends):
    answer = an_answer(**options)
    said(answer, delta(text, finish=finish))
    (last,) = answer.end()
    assert last.finish_reason is ends
    assert bool(last.error) == (ends is FinishReason.ERROR)


def test_tokens_that_nobody_was_given_are_shared_out_among_the_answers():
    answer = an_answer(n=3)
    events = []
    for index in range(3):
        events += said(answer, delta("x", index=index))
        events += said(answer, delta(index=index, finish="stop"))
    said(answer, usage={"prompt_tokens": 3, "completion_tokens": 10})
    events += answer.end()
    given = [ids_of([e for e in events if e.index == index]) for index in range(3)]
    assert sorted(map(len, given)) == [3, 3, 4]


def test_a_count_beyond_what_was_asked_for_is_not_believed():
    answer = an_answer(max_tokens=4)
    (event,) = said(answer, delta("x"), usage={"prompt_tokens": 3, "completion_tokens": 10**12})
    assert event.token_ids == (0, 1, 2, 3)


def test_an_error_in_the_stream_ends_every_answer():
    answer = an_answer(n=2)
    events = said(answer, error={"message": "out of memory"})
    assert [(e.index, e.finish_reason, e.error) for e in events] == [
        (0, FinishReason.ERROR, "out of memory"),
        (1, FinishReason.ERROR, "out of memory"),
    ]
    assert answer.is_over


def test_an_answer_without_an_end_was_broken_off():
    answer = an_answer(n=2)
    said(answer, delta("x", finish="stop"))
    with pytest.raises(EngineDead, match="broke off"):
        answer.end()


def test_half_a_surrogate_pair_does_not_come_through():
    answer = an_answer()
    (event,) = answer.read(b'{"choices": [{"index": 0, "text": "a\\ud83d"}]}')
    assert event.text.encode() == "a\N{REPLACEMENT CHARACTER}".encode()


@pytest.mark.parametrize(
    "chunk",
    [b"", b"[]", b"1", b'{"choices": 5}', b'{"choices": [{"index": 7, "text": "x"}]}',
     b'{"choices": [{"index": -1, "text": "x"}]}', b'{"choices": [{}]}', b"[" * 10**5,
     b'{"usage": {"prompt_tokens": 1}}', b'{"choices": [{"index": Infinity}]}',
     b'{"choices": [{"delta": {"tool_calls": [3]}}]}',
     b'{"choices": [{"delta": {"tool_calls": [{"index": -1}]}}]}'],
)  # fmt: skip
def test_what_is_no_chunk_is_a_dead_engine(chunk):
    with pytest.raises(EngineDead, match="unreadable"):
        an_answer(logprobs=1).read(chunk)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "content", "logprobs", "usage", "index", "text"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_chunk_causes_anything_but_a_dead_engine(value):
    answer = an_answer(logprobs=1)
    try:
        events = answer.read(json.dumps({"choices": [value]} if value else value).encode())
    except EngineDead:
        return
    assert all(len(event.logprobs) == len(event.token_ids) for event in events if event.text == "")
