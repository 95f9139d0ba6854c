from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import replace
from types import MappingProxyType

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine import frames
from pinaivu_node.engine.frames import FrameDecoder, FrameError, RefusalKind, encode
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
    StepFrame,
    TokenEvent,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    logit_bias={3: -1.5},
    stop=("\n", "END"),
    stop_token_ids=(2, 0),
    seed=2**63,
    logprobs=2,
    n=3,
    ignore_eos=True,
)
TALK = (
    ChatMessage("user", "what time is it?"),
    ChatMessage("assistant", "", tool_calls=(ToolCall("call-1", "clock", '{"zone": "ü"}'),)),
    ChatMessage("tool", "noon", tool_call_id="call-1"),
)
TOOLS = ToolUse(
    (Tool("clock", "tells the time", '{"type": "object"}'), Tool("map")),
    choice=ToolChoice.REQUIRED,
    named="clock",
    parallel=False,
)
LOGPROBS = (
    TokenLogprob(
        Alternative(7, b"\xc3", -0.5), (Alternative(7, b"\xc3", -0.5), Alternative(9, b"", -2.25))
    ),
    TokenLogprob(Alternative(8, b"\xbc", float("-inf"))),
)
EVERY_FRAME = [
    frames.Load("{}"),
    frames.Generate(GenerationRequest("a", (ChatMessage("user", "hi ü"),), SAMPLING)),
    frames.Generate(GenerationRequest("b", "raw text", SAMPLING, tenant=b"\x00\xff")),
    frames.Generate(
        GenerationRequest("c", (1, 2, 3), SAMPLING, resume_token_ids=(4, 5), deadline_ms=9)
    ),
    frames.Generate(GenerationRequest("d", (), SamplingParams(max_tokens=1))),
    frames.Generate(
        GenerationRequest(
            "e", TALK, SAMPLING, constraint=Constraint(ConstraintKind.REGEX, "[0-9]+"), tools=TOOLS
        )
    ),
    frames.Generate(
        GenerationRequest("f", "x", SAMPLING, constraint=Constraint(ConstraintKind.JSON_OBJECT))
    ),
    frames.Embed(EmbeddingRequest("a", ("text", (1, 2, 3), ""), deadline_ms=5)),
    frames.Embed(EmbeddingRequest("b", ())),
    frames.Cancel("a"),
    frames.Ping(4),
    frames.Loading(0.25, "reading weights"),
    frames.Ready("cuda:0", "bfloat16", 1, 8192, 31.5, 80, kv_blocks=512),
    frames.LoadFailed("no"),
    frames.Accepted("a", 12),
    frames.Refused("a", "too long"),
    frames.Refused("a", "no room", RefusalKind.FULL),
    frames.Embedded("a", Embeddings(((0.5, -0.25), (1.0, 0.0)), 12)),
    frames.Embedded("a", Embeddings((), 0)),
    frames.Pong(4),
    frames.Gauges(3, 1, 200, 1000, 640, 2, float("inf"), 812.5, 96.25, 4000),
    StepFrame(()),
    StepFrame(
        (
            TokenEvent("a", (7,), "x", 12),
            TokenEvent("a", (7, 8), "x", 12, 4),
            TokenEvent("a", (7,), "", 12, index=2),
            TokenEvent("b", (), "", 3, finish_reason=FinishReason.ERROR, error="why"),
            TokenEvent("c", (7, 8), "ü", 12, 4, index=1, logprobs=LOGPROBS),
            TokenEvent("d", (), "", 12, tool_calls=(ToolCallDelta(0, "call-1", "clock"),)),
            TokenEvent(
                "d",
                (1,),
                "",
                12,
                finish_reason=FinishReason.TOOL_CALLS,
                tool_calls=(ToolCallDelta(0, arguments="{}"),),
            ),
        )
    ),
]


@pytest.mark.parametrize("frame", EVERY_FRAME, ids=lambda frame: type(frame).__name__)
def test_a_frame_survives_the_pipe(frame):
    assert list(FrameDecoder().feed(encode(frame))) == [frame]


def test_frames_may_come_in_any_pieces():
    data = b"".join(encode(frame) for frame in EVERY_FRAME)
    decoder = FrameDecoder()
    heard = [frame for at in range(len(data)) for frame in decoder.feed(data[at : at + 1])]
    assert heard == EVERY_FRAME


def test_every_sampling_parameter_crosses():
    (frame,) = FrameDecoder().feed(encode(EVERY_FRAME[1]))
    for field in dataclasses.fields(SamplingParams):
        assert getattr(frame.request.sampling, field.name) == getattr(SAMPLING, field.name)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x01\xc0",
        b"\x00\x00\x00\x01\x90",
        b"\x00\x00\x00\x03\x91\xa1x",
        b"\x00\x00\x00\x06\x92\xa4ping\xa1"[:10] + b"x",
    ],
)
def test_what_is_no_frame_is_a_frame_error(data):
    with pytest.raises(FrameError):
        list(FrameDecoder().feed(data))


@given(st.binary(max_size=200))
def test_no_bytes_cause_anything_but_a_frame_error(body):
    with contextlib.suppress(FrameError):
        list(FrameDecoder().feed(len(body).to_bytes(4, "big") + body))


@given(st.sampled_from(EVERY_FRAME), st.data())
def test_no_damaged_frame_causes_anything_but_a_frame_error(frame, data):
    damaged = bytearray(encode(frame))
    at = data.draw(st.integers(4, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        list(FrameDecoder().feed(bytes(damaged)))


def test_a_seed_of_any_size_and_a_mapping_of_any_kind_cross():
    bias = MappingProxyType({1: 2.0})
    sampling = SamplingParams(max_tokens=1, seed=-1, logit_bias=bias)
    (frame,) = FrameDecoder().feed(encode(frames.Generate(GenerationRequest("a", "", sampling))))
    assert frame.request.sampling.seed == 2**64 - 1
    assert frame.request.sampling.logit_bias == bias


def test_a_frame_that_is_too_large_is_never_sent():
    with pytest.raises(FrameError):
        encode(frames.LoadFailed("x" * (frames.MAX_FRAME_BYTES + 1)))


HI = ChatMessage("user", "hi")


@pytest.mark.parametrize(
    "prompt",
    [(HI, 5), (5, HI), (5, "x"), (5.0,), (True,), (None,), 5, None, (ChatMessage("user", 5),),
     (2**70,), "\ud800", (b"x",), (replace(HI, tool_calls=(ToolCall("a", "b", b"c"),)),)],
    ids=str,
)  # fmt: skip
def test_a_prompt_that_the_child_could_not_read_is_never_sent(prompt):
    with pytest.raises(FrameError):
        encode(frames.Generate(GenerationRequest("a", prompt, SAMPLING)))


def test_inputs_that_the_child_could_not_read_are_never_sent():
    with pytest.raises(FrameError):
        encode(frames.Embed(EmbeddingRequest("a", ("x", (1, "y")))))


def test_what_says_nothing_is_not_sent():
    empty, plain = StepFrame(()), StepFrame((TokenEvent("a", (7,), "x", 12),))
    # Id, one token id, one letter and a count, each with its mark, and the row's own mark.
    assert len(encode(plain)) - len(encode(empty)) == 1 + 2 + 2 + 2 + 1


@pytest.mark.parametrize(
    "row",
    [
        ("a", "7", "x", 12),
        ("a", b"7", "x", 12),
        ("a", (7.0,), "x", 12),
        ("a", (7,), b"x", 12),
        ("a", (7,), "x"),
        ("a", (7,), "x", 12, 0, 0, "stop"),
        ("a", (7,), "x", 12, 0, 0, "tired", None, (), ()),
        ("a", (7,), "x", 12, 0, 0, None, 5, (), ()),
        ("a", (7,), "x", 12, 0, 0, None, None, ((0, "id", "name"),), ()),
        ("a", (7,), "x", 12, 0, 0, None, None, (), (((7,), (b"x",), ()),)),
        ("a", (7,), "x", 12, 0, 0, None, None, (), (((7,), ("x",), (0.5,)),)),
        ("a", (7,), "x", 12, 0, 0, None, None, (), (((), (), ()),)),
    ],
)
def test_an_event_that_is_none_is_a_frame_error(row):
    body = msgpack.packb(["step", row])
    with pytest.raises(FrameError):
        list(FrameDecoder().feed(len(body).to_bytes(4, "big") + body))


def test_a_large_frame_comes_in_small_pieces_and_does_not_take_the_next_with_it():
    large, small = frames.LoadFailed("x" * 2**20), frames.Pong(1)
    data = encode(large) + encode(small) + encode(small)[:3]
    decoder = FrameDecoder()
    pieces = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == [large, small]
    assert list(decoder.feed(encode(small)[3:])) == [small]


def test_many_vectors_go_out_in_small_frames_and_their_tokens_are_counted_once():
    vectors = tuple((float(number),) * 4096 for number in range(10))
    parts = list(frames.embedded("a", Embeddings(vectors, 77)))
    assert len(parts) == 3
    assert tuple(v for part in parts for v in part.embeddings.vectors) == vectors
    assert sum(part.embeddings.input_tokens for part in parts) == 77
    assert list(frames.embedded("a", Embeddings((), 0))) == [
        frames.Embedded("a", Embeddings((), 0))
    ]
