"""An award is taken whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dispatches
import pytest
from dispatches import COORDINATOR, GATEWAY, NOW, PRICES, PROVIDERS, STRANGER, TTL, award, token

from pinaivu_gateway.awards import Assignment, open_award_untrusted
from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import request_id_of
from pinaivu_node.protocol.inference import ChatTurn, Prompt, Sampling
from pinaivu_node.protocol.market import Award, JobKind, JobRequest
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.signing import Envelope

OTHER_PROMPT = Prompt(nonce=bytes(16), turns=(ChatTurn(role="user", content="ho"),))
DEARER = PriceList(input=PRICES.input, cached_input=PRICES.cached_input, output=PRICES.output + 1)


def opened(an_award: Award, a_request: JobRequest | None = None) -> tuple[Assignment, ...]:
    return open_award_untrusted(
        an_award,
        a_request or dispatches.request(),
        coordinator=COORDINATOR.peer_id,
        gateway=GATEWAY.peer_id,
    )


def test_the_request_binds_prompt_and_sampling_without_showing_them() -> None:
    order = dispatches.order(input_estimate=999, output_estimate=999)
    terms = dispatches.request(input_estimate=999, output_estimate=999).terms
    assert terms.input_commitment == order.prompt.commitment
    assert terms.sampling_digest == order.sampling.digest
    assert terms.deadline == NOW + order.deadline_in
    # No estimate is above its limit: the coordinator would refuse the terms.
    assert (terms.input_estimate, terms.output_estimate) == (200, 300)


def test_winner_and_standbys_come_in_their_order_with_their_addresses() -> None:
    found = opened(award(token(0), token(1), token(2)))
    assert [each.provider for each in found] == [each.peer_id for each in PROVIDERS]
    assert found[1].addresses == (dispatches.address(PROVIDERS[1].peer_id),)
    assert found[1].envelope == COORDINATOR.seal(token(1))


def test_a_winner_without_a_contact_is_still_worth_a_try() -> None:
    """Its stream may be open already."""
    nobodys = award(token(0)).model_copy(update={"contacts": ()})
    assert opened(nobodys)[0].addresses == ()


@pytest.mark.parametrize(
    "change",
    [
        {"gateway": STRANGER.peer_id},
        {"request_id": request_id_of(b"\x01" * 16)},
        {"model": "gemma3:270m"},
        {"kind_of_job": JobKind.COMPLETION},
        {"input_commitment": OTHER_PROMPT.commitment},
        {"sampling_digest": Sampling(max_tokens=1).digest},
        {"input_limit": 201},
        {"output_limit": 301},
        {"deadline": NOW + 60_001},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_token_for_something_else_condemns_the_award(rank: int, change: dict[str, Any]) -> None:
    tokens = [token(0), token(1)]
    tokens[rank] = token(rank, **change)
    with pytest.raises(RemoteProtocolError):
        opened(award(*tokens))


@pytest.mark.parametrize(
    ("terms", "change"),
    [
        ({"max_prices": PRICES}, {"prices": DEARER}),
        ({"deny": (PROVIDERS[0].peer_id,)}, {}),
        ({"allow": (PROVIDERS[1].peer_id,)}, {}),
        ({"allow": ()}, {}),
    ],
)
def test_what_the_client_ruled_out_is_not_taken(
    terms: dict[str, Any], change: dict[str, Any]
) -> None:
    request = dispatches.request(**terms)
    with pytest.raises(RemoteProtocolError):
        opened(award(token(0, of=request, **change)), request)


def test_the_highest_price_allowed_is_allowed() -> None:
    request = dispatches.request(max_prices=PRICES)
    assert opened(award(token(0, of=request)), request)


def _resigned(sealed: Envelope) -> Envelope:
    return STRANGER.seal(token(0))


def _renamed(sealed: Envelope) -> Envelope:
    return sealed.model_copy(update={"signer": STRANGER.peer_id})


def _altered(sealed: Envelope) -> Envelope:
    return sealed.model_copy(update={"body": sealed.body[:-1] + b"\x00"})


def _of_another_kind(sealed: Envelope) -> Envelope:
    return sealed.model_copy(update={"content": "receipt/1"})


@pytest.mark.parametrize("forge", [_resigned, _renamed, _altered])
def test_a_forged_token_is_no_accident(forge: Callable[[Envelope], Envelope]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        opened(award(forge(COORDINATOR.seal(token(0)))))
    assert caught.value.action is PeerAction.BAN


def test_a_signature_for_another_purpose_is_none() -> None:
    with pytest.raises(RemoteProtocolError):
        opened(award(_of_another_kind(COORDINATOR.seal(token(0)))))


def test_nobody_is_winner_and_standby_at_once() -> None:
    twice = token(1, provider=PROVIDERS[0].peer_id)
    with pytest.raises(RemoteProtocolError, match="twice"):
        opened(award(token(0), twice))


@pytest.mark.parametrize("ranks", [(1, 0), (0, 0), (0, 2), (1,)])
def test_the_ranks_are_counted_from_the_winner(ranks: tuple[int, ...]) -> None:
    tokens = [token(place).model_copy(update={"rank": rank}) for place, rank in enumerate(ranks)]
    with pytest.raises(RemoteProtocolError, match="rank"):
        opened(award(*tokens))


def test_a_token_of_another_time_is_left_to_the_failover() -> None:
    """The award is honest, only late: whoever dispatches skips what has expired."""
    late = token(0, expires_at=NOW - TTL)
    assert opened(award(late))[0].token.expires_at == NOW - TTL
