"""`/v1/receipts`, `/v1/models` and `/v1/nodes` as a client reads them."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from counting_market import DIGEST, MODEL, PROVIDERS, USAGE
from http_client import Counter, open_counter

from pinaivu_gateway.jobs import CoordinatorUnreachable
from pinaivu_node.protocol.ids import digest_of, request_id_of
from pinaivu_node.protocol.market import (
    AnswerRecord,
    AuctionPolicy,
    AuctionRecord,
    Bid,
    JobKind,
    JobTerms,
    Measurement,
    Outcome,
    Pass,
    PassReason,
    Preference,
    Proof,
    SegmentOutcome,
)
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.receipt import Receipt, ReceiptReply
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted
from pinaivu_node.protocol.wire import encode_body

COORDINATOR, GATEWAY = Signer(b"c" * 32), Signer(b"g" * 32)
REQUEST = request_id_of(b"q" * 16)
PRICES = PriceList(input=50, cached_input=12, output=200)


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


def receipt() -> Receipt:
    return Receipt(
        request_id=REQUEST,
        coordinator=COORDINATOR.peer_id,
        gateway=GATEWAY.peer_id,
        provider=PROVIDERS[0].peer_id,
        kind_of_job=JobKind.CHAT,
        model=MODEL,
        model_digest=DIGEST,
        sampling_digest=DIGEST,
        input_commitment=DIGEST,
        output_hash=DIGEST,
        bid_set_root=DIGEST,
        bids=1,
        passes=1,
        policy_hash=DIGEST,
        segments=(),
        amount=5,
        fee=1,
        outcome=Outcome.COMPLETED,
        opened_at=1,
        awarded_at=2,
        settled_at=3,
        ledger_entry=4,
        delivery=None,
        attestation=None,
    )


def proof() -> Proof:
    return Proof(
        request_id=REQUEST,
        provider=PROVIDERS[0].peer_id,
        gateway=GATEWAY.peer_id,
        model_digest=DIGEST,
        usage=USAGE,
        output_hash=DIGEST,
        token=DIGEST,
        outcome=SegmentOutcome.COMPLETED,
        engine_ttft_ms=5,
        duration_ms=9,
        voucher=None,
    )


def leaves() -> tuple[bytes, ...]:
    terms = JobTerms(
        request_id=REQUEST,
        kind=JobKind.CHAT,
        model=MODEL,
        model_digest=None,
        input_estimate=1,
        input_limit=2,
        output_estimate=3,
        output_limit=4,
        max_prices=None,
        preference=Preference.PRICE,
        sampling_digest=DIGEST,
        input_commitment=digest_of(b"prompt"),
        deadline=10,
    )
    policy = AuctionPolicy(
        window_ms=400,
        grace_ms=30,
        enough_bids=8,
        bid_target=16,
        standbys=2,
        price_ceiling=PRICES,
        time_value_price=0,
        time_value_balanced=5,
        time_value_latency=50,
        prior_ttft_ms=400,
        prior_millitokens_per_second=20_000,
        prior_reliability_ppm=900_000,
        prior_weight=4,
        fee_ppm=20_000,
        token_ttl_ms=10_000,
    )
    record = AuctionRecord(
        coordinator=COORDINATOR.peer_id,
        gateway=GATEWAY.peer_id,
        terms=terms,
        allow=None,
        deny=(),
        policy=policy,
        opened_at=1,
        closed_at=2,
    )
    passed = Pass(request_id=REQUEST, bidder=PROVIDERS[1].peer_id, reason=PassReason.FULL)
    return (
        encode_body(record),
        encode_body(answer(PROVIDERS[0].seal(bid()))),
        encode_body(answer(PROVIDERS[1].seal(passed))),
    )


def bid() -> Bid:
    return Bid(
        request_id=REQUEST,
        bidder=PROVIDERS[0].peer_id,
        model_digest=DIGEST,
        prices=PRICES,
        context_window=8192,
        warm_tokens=0,
        expires_at=99,
    )


def answer(envelope: Envelope) -> AnswerRecord:
    measured = Measurement(ttft_ms=1, millitokens_per_second=2, reliability_ppm=3, samples=0)
    return AnswerRecord(
        answer=envelope, received_at=7, measurement=measured, banned=False, full=False
    )


async def test_a_receipt_is_readable_and_checkable(counter: Counter):
    sealed, proven = COORDINATOR.seal(receipt()), PROVIDERS[0].seal(proof())
    counter.market.receipts[REQUEST] = ReceiptReply(
        request_id=REQUEST, receipt=sealed, proofs=(proven,)
    )
    async with counter.client() as client:
        got = (await client.get(f"/v1/receipts/{REQUEST}?wait=2.5")).json()
    assert counter.market.asked == [(REQUEST, 2500)]
    assert got["request_id"] == REQUEST
    assert got["receipt"]["amount"] == 5
    assert got["receipt"]["outcome"] == "completed"
    assert got["delivery"] is None
    assert len(got["proofs"]) == 1
    envelope = Envelope(
        content=got["envelope"]["content"],
        body=base64.b64decode(got["envelope"]["body"]),
        signer=got["envelope"]["signer"],
        signature=base64.b64decode(got["envelope"]["signature"]),
    )
    assert open_untrusted(envelope, Receipt, signer=COORDINATOR.peer_id) == receipt()


async def test_a_receipt_that_is_not_there_yet_may_be_asked_for_again(counter: Counter):
    async with counter.client() as client:
        got = await client.get(f"/v1/receipts/{REQUEST}")
    assert got.status_code == 404
    assert got.json()["error"]["code"] == "receipt_not_ready"
    assert got.headers["retry-after"] == "1"


@pytest.mark.parametrize(("wait", "asked"), [("0", 0), ("10", 10_000), ("1e9", 10_000)])
async def test_the_wait_is_bounded(counter: Counter, wait, asked):
    async with counter.client() as client:
        await client.get(f"/v1/receipts/{REQUEST}?wait={wait}")
    assert counter.market.asked == [(REQUEST, asked)]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/receipts/nonsense",
        "/v1/receipts/req_" + "0" * 31,
        "/v1/receipts/req_" + "0" * 32 + "%0A",
        "/v1/receipts/REQ_" + "0" * 32 + "/bids",
        f"/v1/receipts/{REQUEST}?wait=nan",
        f"/v1/receipts/{REQUEST}?wait=-1",
        f"/v1/receipts/{REQUEST}?wait=inf",
        f"/v1/receipts/{REQUEST}?wait=x",
    ],
)
async def test_nonsense_is_refused_without_asking_the_coordinator(counter: Counter, path):
    async with counter.client() as client:
        got = await client.get(path)
    assert got.status_code == 400
    assert counter.market.asked == []


async def test_a_bid_set_is_decoded_and_committed_to(counter: Counter):
    counter.market.leaves[REQUEST] = leaves()
    async with counter.client() as client:
        got = (await client.get(f"/v1/receipts/{REQUEST}/bids")).json()
    assert got["root"] == tree_root([base64.b64decode(each) for each in got["leaves"]])
    assert got["record"]["terms"]["model"] == MODEL
    won, passed = got["answers"]
    assert won["bidder"] == PROVIDERS[0].peer_id
    assert won["prices"]["output"] == 200
    assert (won["kind"], won["received_at"]) == ("bid", 7)
    assert (passed["kind"], passed["reason"]) == ("pass", "full")


async def test_an_unknown_bid_set_is_a_404(counter: Counter):
    async with counter.client() as client:
        got = await client.get(f"/v1/receipts/{REQUEST}/bids")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "bid_set_not_found")


@pytest.mark.parametrize("path", ["", "/bids"])
async def test_a_coordinator_that_is_away_is_a_502(counter: Counter, path):
    counter.market.unreachable = CoordinatorUnreachable("away")
    async with counter.client() as client:
        got = await client.get(f"/v1/receipts/{REQUEST}{path}")
    assert (got.status_code, got.json()["error"]["code"]) == (502, "coordinator_unreachable")


@pytest.mark.parametrize("path", ["", "/bids"])
async def test_garbage_from_the_coordinator_is_a_502(counter: Counter, path):
    garbled = COORDINATOR.seal(receipt()).model_copy(update={"body": b"\xc1"})
    counter.market.receipts[REQUEST] = ReceiptReply(request_id=REQUEST, receipt=garbled)
    counter.market.leaves[REQUEST] = (leaves()[0], b"\xc1")
    async with counter.client() as client:
        got = await client.get(f"/v1/receipts/{REQUEST}{path}")
    assert got.status_code == 502


async def test_models_and_nodes_are_what_the_roster_says(counter: Counter):
    async with counter.client() as client:
        models = (await client.get("/v1/models")).json()
        model = (await client.get(f"/v1/models/{MODEL}")).json()
        nodes = (await client.get("/v1/nodes")).json()
    assert models == {"object": "list", "data": [model]}
    assert model["providers"] == 2
    assert [each["peer"] for each in nodes["data"]] == [each.peer_id for each in PROVIDERS]


async def test_an_empty_network_lists_nothing(counter: Counter):
    counter.market.roster = ()
    async with counter.client() as client:
        for path in ("/v1/models", "/v1/nodes"):
            assert (await client.get(path)).json() == {"object": "list", "data": []}
