from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.types import EngineStatistics, TokenEvent
from pinaivu_node.protocol.ids import PeerId
from pinaivu_node.provider import warmth as warmth_module
from pinaivu_node.provider.warmth import ALLOWANCE, Chain, Warmth

NOTICE_S = 10.0
GATEWAY = PeerId("gateway")


def engine(*, horizon=math.inf, restarts=0) -> EngineStatistics:
    return EngineStatistics(
        ready=True,
        running=0,
        queued=0,
        capacity=4,
        context_window=8192,
        tokens_per_second=50.0,
        ttft_estimate_ms=40,
        restarts=restarts,
        generated_tokens=0,
        device="none",
        dtype="none",
        prefix_horizon_s=horizon,
    )


def chain(text: str, *, gateway=GATEWAY) -> Chain:
    """One letter per turn, each fingerprint naming all the letters up to its own."""
    return Chain(gateway, tuple(text[:end].encode() for end in range(1, len(text) + 1)))


class Box:
    """A provider with one engine, and time that passes as the test says."""

    def __init__(self, **engine_fields) -> None:
        self.warmth = Warmth(notice_s=NOTICE_S, capacity=8)
        self.now = 1000.0
        self.fields = engine_fields

    def claim(self, text, *, request="r", gateway=GATEWAY) -> int:
        stats = engine(**self.fields)
        asked = chain(text, gateway=gateway)
        return self.warmth.warm_tokens(request, asked, stats, now=self.now)

    def serve(self, text, tokens, *, cached=0, request="r", gateway=GATEWAY, resumed=0) -> None:
        event = TokenEvent(request, (1,), "a", input_tokens=tokens, cached_tokens=cached)
        self.warmth.computed(
            chain(text, gateway=gateway),
            event,
            engine(**self.fields),
            resumed=resumed,
            now=self.now,
        )


def test_the_next_turn_of_a_chat_is_warm_up_to_the_last_prompt():
    box = Box()
    assert box.claim("abc") == 0
    box.serve("abc", 1000)
    assert box.claim("abcde") == 896  # 15 whole blocks, less one


def test_the_longest_beginning_counts():
    box = Box()
    box.serve("a", 300)
    box.serve("abc", 700)
    assert box.claim("abcde") == 576
    assert box.claim("axy") == 192


def test_a_shared_system_prompt_is_as_long_as_two_conversations_have_in_common():
    box = Box()
    box.serve("sa", 700)
    assert box.claim("sb") == 0  # how long the system prompt is, nobody has said
    box.serve("sb", 800, cached=640)  # they begin alike beyond it
    assert box.claim("sc") == 640
    box.serve("sc", 900, cached=512)
    assert box.claim("sd") == 512
    box.serve("sd", 900, cached=576)
    assert box.claim("se") == 512


def test_a_guess_that_fell_short_says_nothing_about_the_size_of_blocks():
    box = Box()
    box.serve("sa", 700)
    box.serve("sb", 800, cached=640)
    assert box.claim("sc") == 640
    box.serve("sc", 1000, cached=512)
    assert box.claim("scxx") == 896


def test_a_length_that_is_known_is_not_guessed_again():
    box = Box()
    box.serve("sa", 1000)
    box.serve("sab", 2000, cached=64)
    assert box.claim("sax") == 896


def test_a_prompt_of_two_blocks_or_less_is_nothing():
    box = Box()
    box.serve("a", 127)
    assert box.claim("ab") == 0
    box.serve("a", 128)
    assert box.claim("ab") == 64


def test_an_engine_that_keeps_nothing_is_never_warm():
    box = Box(horizon=0.0)
    box.serve("a", 1000)
    assert box.claim("ab") == 0
    assert len(box.warmth) == 0


def test_what_may_be_evicted_before_the_job_comes_is_not_claimed():
    box = Box(horizon=60.0)
    box.serve("a", 1000)
    box.now += 60.0 - NOTICE_S
    assert box.claim("ab") == 896
    box.now += 0.5
    assert box.claim("ab") == 0


def test_a_stale_end_does_not_hide_a_beginning_that_is_in_use():
    box = Box(horizon=60.0)
    box.serve("a", 500)
    box.serve("abc", 1000)
    box.now += 55
    box.serve("axy", 800)
    assert box.claim("abcde") == 384


def test_an_answer_that_takes_long_keeps_its_prompt_warm():
    box = Box(horizon=60.0)
    box.serve("a", 1000)
    box.now += 300
    box.warmth.used(chain("a"), now=box.now)
    assert box.claim("ab") == 896


def test_a_restarted_engine_has_nothing_left():
    box = Box()
    box.serve("a", 1000)
    box.fields["restarts"] = 1
    assert box.claim("ab") == 0
    box.serve("ab", 1100)
    assert box.claim("abc") == 1024


def test_a_restart_between_bid_and_job_is_not_held_against_the_gateway():
    box = Box()
    for restart in range(20):
        box.fields["restarts"] = 2 * restart
        box.serve("a", 1000)
        assert box.claim("ab") == 896
        box.fields["restarts"] = 2 * restart + 1
        box.serve("ab", 1100, cached=0)
    assert box.claim("abc") == 1024


def test_a_claim_that_came_to_nothing_is_forgotten_and_what_was_served_then_is_known():
    box = Box()
    box.serve("a", 1000)
    assert box.claim("ab") == 896
    box.serve("ab", 1100, cached=0)
    assert box.claim("ax") == 0
    assert box.claim("abc") == 1024


def test_larger_blocks_are_noticed():
    box = Box()
    box.serve("a", 1000)
    assert box.claim("ab") == 896
    box.serve("ab", 1000, cached=768)  # blocks of 256
    assert box.claim("abc") == 768


def test_another_gateways_fingerprints_are_another_matter():
    box = Box()
    box.serve("a", 1000)
    assert box.claim("ab", gateway=PeerId("other")) == 0


def test_a_gateway_whose_fingerprints_lie_costs_a_bounded_sum_and_others_nothing():
    box = Box()
    box.serve("z", 1000, gateway=PeerId("honest"))
    lost = 0
    for number in range(100):
        box.serve("a", 2000, request=f"bait{number}")
        claim = box.claim("ab", request=f"catch{number}")
        lost += claim
        box.serve("ab", 2000, cached=0, request=f"catch{number}")
    assert 0 < lost <= ALLOWANCE + 2000
    assert box.claim("zy", gateway=PeerId("honest")) == 896
    box.now += warmth_module.ACCOUNT_S
    box.serve("a", 2000)
    assert box.claim("ab") > 0


def test_a_resumed_job_teaches_the_prompts_length_alone():
    box = Box()
    box.serve("a", 1000, resumed=500)
    assert box.claim("ab") == 384


def test_the_memory_is_bounded_and_keeps_what_was_used_last():
    box = Box()
    for letter in "abcdefgh":
        box.serve(letter, 1000)
    box.serve("ax", 1000)
    assert len(box.warmth) == 8
    assert box.claim("ay") == 896
    assert box.claim("by") == 0


def test_a_completion_without_fingerprints_is_neither_learned_nor_claimed():
    box = Box()
    box.serve("", 1000)
    assert box.claim("") == 0
    assert len(box.warmth) == 0


@pytest.mark.parametrize("block", [16, 64, 256])
@given(data=st.data())
def test_no_more_is_claimed_than_an_engine_of_whole_blocks_has(block, data):
    """Once it has been seen how large the blocks are; the turns' marks are up to 30 tokens."""
    box = Box()
    for number in range(3):
        box.serve("a", 4000, request=f"s{number}")
        if box.claim("ab", request=f"s{number}b"):
            box.serve("ab", 4100, cached=3990 // block * block, request=f"s{number}b")
    tokens = data.draw(st.integers(1, 8000))
    opening = data.draw(st.integers(0, 30))
    box.serve("xyz", tokens)
    assert box.claim("xyzuv") <= max(0, tokens - opening) // block * block
