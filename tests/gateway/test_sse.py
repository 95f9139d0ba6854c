"""Golden bytes: what a client reads, to the byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.sse import DONE, PING, ChunkTemplate, event

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
OPEN = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m",'


def test_the_chunks_of_a_chat():
    template = ChunkTemplate(HEAD, chat=True, include_usage=False)
    assert template.opening() == (
        OPEN + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},'
        b'"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert template.text('a "é"\n') == (
        OPEN
        + '"choices":[{"index":0,"delta":{"content":"a \\"é\\"\\n"},"logprobs":null,'.encode()
        + b'"finish_reason":null}]}\n\n'
    )
    assert template.finish("length") + template.end({"total_tokens": 3}) == (
        OPEN
        + b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
        + b"data: [DONE]\n\n"
    )


def test_a_chunk_with_logprobs():
    template = ChunkTemplate(HEAD, chat=True, include_usage=False)
    assert template.text("a", {"content": [{"token": "é"}], "refusal": None}) == (
        OPEN
        + b'"choices":[{"index":0,"delta":{"content":"a"},"logprobs":'
        + '{"content":[{"token":"é"}],"refusal":null},"finish_reason":null}]}\n\n'.encode()
    )


def test_the_chunks_of_a_chat_with_usage():
    template = ChunkTemplate(HEAD, chat=True, include_usage=True)
    assert template.text("a").endswith(b'"finish_reason":null}],"usage":null}\n\n')
    assert (template.finish("stop") + template.end({"total_tokens": 3})).endswith(
        b'"finish_reason":"stop"}],"usage":null}\n\n'
        + OPEN
        + b'"choices":[],"usage":{"total_tokens":3}}\n\ndata: [DONE]\n\n'
    )


def test_the_chunks_of_a_completion():
    template = ChunkTemplate(HEAD, chat=False, include_usage=False)
    assert template.opening() == b""
    assert template.text("a") == (
        OPEN + b'"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert template.finish("stop") + template.end({}) == (
        OPEN
        + b'"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]}\n\n'
        + DONE
    )


def test_the_chunks_of_another_choice():
    template = ChunkTemplate(HEAD, chat=True, include_usage=False, index=3)
    for chunk in (template.opening(), template.text("a"), template.calls([]), template.finish("x")):
        assert json.loads(chunk[6:])["choices"][0]["index"] == 3


def test_an_error_and_a_comment():
    assert event({"error": {"code": None}}) == b'data: {"error":{"code":null}}\n\n'
    assert PING == b": ping\n\n"


@pytest.mark.parametrize("chat", [True, False])
@given(text=st.text())
def test_any_text_is_one_line_of_json(chat, text):
    chunk = ChunkTemplate(HEAD, chat=chat, include_usage=True).text(text)
    assert chunk.startswith(b"data: {")
    assert chunk.endswith(b"}\n\n")
    assert chunk.count(b"\n") == 2
    assert b"\r" not in chunk
    choice = json.loads(chunk[6:])["choices"][0]
    assert (choice["delta"]["content"] if chat else choice["text"]) == text


def test_half_a_character_does_no_harm():
    template = ChunkTemplate({**HEAD, "model": "\ud83d"}, chat=True, include_usage=True)
    json.loads(template.text("\ud83d")[6:])
