"""The account that is kept while one provider streams."""

from __future__ import annotations

from typing import Any

import pytest
from dispatches import COORDINATOR, GATEWAY, OUTPUT_LIMIT, PROVIDERS, STRANGER, assignment, token
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_gateway.segment import VOUCHER_STEP, Segment
from pinaivu_node.protocol.answer import digest_of_answer, digest_of_answers
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import digest_of, request_id_of
from pinaivu_node.protocol.inference import (
    Done,
    Finish,
    TokenDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from pinaivu_node.protocol.market import Proof, SegmentOutcome
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage
from pinaivu_node.protocol.signing import Signer

PROVIDER = PROVIDERS[0]
REQUEST = token().request_id
STARTED = 100.0


def segment(position: int = 0) -> Segment:
    return Segment(
        assignment(),
        gateway=GATEWAY.peer_id,
        input_estimate=20,
        now=STARTED,
        position=position,
    )


def delta(position: int, tokens: int, text: str | None = None) -> TokenDelta:
    return TokenDelta(
        request_id=REQUEST,
        position=position,
        token_ids=tuple(range(tokens)),
        text="x" * tokens if text is None else text,
    )


def done(text: str, output: int, *, signer: Signer = PROVIDER, **changes: Any) -> Done:
    fields: dict[str, Any] = {
        "request_id": REQUEST,
        "provider": PROVIDER.peer_id,
        "gateway": GATEWAY.peer_id,
        "model_digest": token().model_digest,
        "usage": TokenUsage(input=9, cached_input=2, output=output),
        "output_hash": digest_of(text.encode()),
        "token": COORDINATOR.seal(token()).digest,
        "outcome": SegmentOutcome.COMPLETED,
        "engine_ttft_ms": 5,
        "duration_ms": 50,
        "voucher": None,
    }
    proof = signer.seal(Proof(**{**fields, **changes}))
    return Done(request_id=REQUEST, finish=Finish.STOP, proof=proof)


@given(st.lists(st.integers(min_value=0, max_value=20), max_size=15), st.data())
def test_whatever_the_steps_the_count_and_the_hash_are_of_the_whole(
    steps: list[int], data: st.DataObject
) -> None:
    account, text, position = segment(), "", 0
    for step in steps:
        part = data.draw(st.text(alphabet="a\u00e9\U0001f30a", max_size=10 * step))
        account.take_untrusted(delta(position, step, part), now=STARTED + 1)
        text, position = text + part, position + step
    assert account.output_tokens == position
    assert account.output_hash == digest_of(text.encode())
    assert account.has_begun == (position > 0)
    assert account.finish_untrusted(done(text, position)).output == position


@pytest.mark.parametrize("position", [0, 4, 6])
def test_a_gap_or_a_repeat_is_noticed(position: int) -> None:
    account = segment()
    account.take_untrusted(delta(0, 5), now=STARTED)
    with pytest.raises(RemoteProtocolError, match=str(position)):
        account.take_untrusted(delta(position, 1), now=STARTED)
    assert account.output_tokens == 5


def test_the_last_token_that_was_auctioned_is_the_last_that_is_taken() -> None:
    account = segment()
    account.take_untrusted(delta(0, OUTPUT_LIMIT), now=STARTED)
    with pytest.raises(RemoteProtocolError, match="more output tokens"):
        account.take_untrusted(delta(OUTPUT_LIMIT, 1), now=STARTED)


def test_what_another_delivered_before_counts_towards_the_limit() -> None:
    account = segment(position=OUTPUT_LIMIT - 1)
    account.take_untrusted(delta(OUTPUT_LIMIT - 1, 1), now=STARTED)
    assert account.output_tokens == 1
    with pytest.raises(RemoteProtocolError, match="more output tokens"):
        account.take_untrusted(delta(OUTPUT_LIMIT, 1), now=STARTED)


def test_text_without_tokens_is_not_a_way_to_fill_our_memory() -> None:
    account = segment()
    account.take_untrusted(delta(0, 1, "x" * 1024), now=STARTED)
    with pytest.raises(RemoteProtocolError, match="more text"):
        account.take_untrusted(delta(1, 0, "x"), now=STARTED)


def test_tool_calls_are_of_the_answer_that_is_hashed_and_signed() -> None:
    account = segment()
    pieces = (
        ToolCallDelta(index=0, id="call_1", name="weather", arguments='{"in"'),
        ToolCallDelta(index=0, arguments=': "Bern"}'),
    )
    for number, piece in enumerate(pieces):
        said = delta(number, 1, "")
        account.take_untrusted(said.model_copy(update={"tool_calls": (piece,)}), now=STARTED)
    call = ToolCall(id="call_1", name="weather", arguments='{"in": "Bern"}')
    assert account.output_hash == digest_of_answer("", [call])
    assert account.finish_untrusted(done("", 2, output_hash=account.output_hash)).output == 2


def test_calls_without_tokens_are_not_a_way_to_fill_our_memory() -> None:
    account = segment()
    said = delta(0, 1, "").model_copy(update={"tool_calls": (ToolCallDelta(index=0),) * 1024})
    account.take_untrusted(said, now=STARTED)
    more = delta(1, 0, "").model_copy(update={"tool_calls": (ToolCallDelta(index=0),)})
    with pytest.raises(RemoteProtocolError, match="more text"):
        account.take_untrusted(more, now=STARTED)


def test_there_is_a_logprob_for_each_token_or_there_is_none() -> None:
    one = TokenLogprob(chosen=(0, b"a", -0.5))
    account = segment()
    account.take_untrusted(delta(0, 2).model_copy(update={"logprobs": (one, one)}), now=STARTED)
    with pytest.raises(RemoteProtocolError, match="logprob"):
        account.take_untrusted(delta(2, 2).model_copy(update={"logprobs": (one,)}), now=STARTED)


def test_a_voucher_is_due_at_every_step_and_admits_everything_so_far() -> None:
    account, admitted = segment(), []
    for position in range(OUTPUT_LIMIT):
        account.take_untrusted(delta(position, 1), now=STARTED)
        voucher = account.voucher_due()
        if voucher is not None:
            assert (voucher.request_id, voucher.provider) == (REQUEST, PROVIDER.peer_id)
            admitted.append(voucher.output_tokens)
    assert admitted == [VOUCHER_STEP, 2 * VOUCHER_STEP]


def test_a_burst_is_vouched_for_at_once() -> None:
    account = segment()
    account.take_untrusted(delta(0, 250), now=STARTED)
    voucher = account.voucher_due()
    assert voucher is not None
    assert voucher.output_tokens == 250
    assert account.voucher_due() is None


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": request_id_of(b"\x01" * 16)},
        {"provider": PROVIDERS[1].peer_id},
        {"gateway": STRANGER.peer_id},
        {"token": digest_of(b"another token")},
        {"model_digest": digest_of(b"smaller weights")},
        {"usage": TokenUsage(input=199, cached_input=2, output=3)},
        {"usage": TokenUsage(input=9, cached_input=2, output=4)},
        {"usage": TokenUsage(input=9, cached_input=2, output=2)},
        {"output_hash": digest_of(b"another text")},
    ],
    ids=str,
)
def test_a_signed_proof_of_something_else_is_no_accident(change: dict[str, Any]) -> None:
    account = segment()
    account.take_untrusted(delta(0, 3, "sea"), now=STARTED)
    with pytest.raises(RemoteProtocolError) as caught:
        account.finish_untrusted(done("sea", 3, **change))
    assert caught.value.action is PeerAction.BAN


def test_a_proof_in_the_providers_name_must_be_its_own() -> None:
    account = segment()
    account.take_untrusted(delta(0, 3, "sea"), now=STARTED)
    with pytest.raises(RemoteProtocolError):
        account.finish_untrusted(done("sea", 3, signer=STRANGER))


def test_the_report_says_what_was_proven_and_measured() -> None:
    account = segment()
    account.take_untrusted(delta(0, 0, ""), now=STARTED + 0.1)
    account.take_untrusted(delta(0, 3, "sea"), now=STARTED + 0.25)
    account.finish_untrusted(done("sea", 3))
    report = account.report(SegmentOutcome.COMPLETED, now=STARTED + 1)
    assert report.usage == TokenUsage(input=9, cached_input=2, output=3)
    assert report.output_hash == digest_of(b"sea")
    assert (report.ttft_ms, report.duration_ms) == (250, 1000)


def test_without_a_proof_our_own_counts_stand() -> None:
    account = segment()
    account.take_untrusted(delta(0, 3, "sea"), now=STARTED)
    report = account.report(SegmentOutcome.DIED, now=STARTED + 1)
    assert report.usage == TokenUsage(input=20, cached_input=0, output=3)


def test_who_delivered_nothing_is_owed_nothing() -> None:
    report = segment().report(SegmentOutcome.REFUSED, now=STARTED + 1)
    assert report.usage == ZERO_USAGE
    assert report.output_hash == digest_of(b"")
    assert report.ttft_ms is None


def several(answers: int = 2) -> Segment:
    return Segment(
        assignment(), gateway=GATEWAY.peer_id, input_estimate=20, now=STARTED, answers=answers
    )


def test_several_answers_have_the_digest_of_all_and_each_its_end():
    account = several()
    account.take_untrusted(of_answer(1, delta(0, 1, "b")), now=STARTED)
    account.take_untrusted(of_answer(0, delta(1, 2, "aa"), finish=Finish.STOP), now=STARTED)
    assert not account.is_whole
    account.take_untrusted(of_answer(1, delta(3, 1, "b"), finish=Finish.LENGTH), now=STARTED)
    assert account.is_whole
    assert account.output_hash == digest_of_answers([("aa", ()), ("bb", ())])


@pytest.mark.parametrize(
    ("answers", "index", "finish"),
    [(1, 1, None), (2, 2, None), (1, 0, Finish.STOP), (2, 1, Finish.ERROR), (2, 0, None)],
)
def test_answers_that_cannot_be_are_refused(answers, index, finish):
    account = several(answers)
    if answers > 1:
        account.take_untrusted(of_answer(0, delta(0, 0), finish=Finish.STOP), now=STARTED)
    with pytest.raises(RemoteProtocolError):
        account.take_untrusted(of_answer(index, delta(0, 1), finish=finish), now=STARTED)


def of_answer(index: int, what: TokenDelta, *, finish: Finish | None = None) -> TokenDelta:
    return what.model_copy(update={"index": index, "finish": finish})
