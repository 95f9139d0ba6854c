from __future__ import annotations

import contextlib
import dataclasses
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine import frames
from pinaivu_node.engine.frames import FrameDecoder, FrameError, encode
from pinaivu_node.engine.types import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    StepFrame,
    TokenEvent,
)

SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    logit_bias={3: -1.5},
    stop=("\n", "END"),
    seed=2**63,
    logprobs=2,
    ignore_eos=True,
)
EVERY_FRAME = [
    frames.Load("{}"),
    frames.Generate(GenerationRequest("a", (ChatMessage("user", "hi ü"),), SAMPLING)),
    frames.Generate(GenerationRequest("b", "raw text", SAMPLING, tenant=b"\x00\xff")),
    frames.Generate(
        GenerationRequest("c", (1, 2, 3), SAMPLING, resume_token_ids=(4, 5), deadline_ms=9)
    ),
    frames.Generate(GenerationRequest("d", (), SamplingParams(max_tokens=1))),
    frames.Cancel("a"),
    frames.Ping(4),
    frames.Ready("cuda:0", "bfloat16", 1, 8192, 31.5, 80),
    frames.LoadFailed("no"),
    frames.Accepted("a", 12),
    frames.Refused("a", "too long"),
    frames.Pong(4),
    StepFrame(
        (
            TokenEvent("a", (7, 8), "x", 12, 4),
            TokenEvent("b", (), "", 3, finish_reason=FinishReason.ERROR, error="why"),
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
