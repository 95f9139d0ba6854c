"""One of every message, always the same: what the golden bytes are of."""

from __future__ import annotations

from pinaivu_node.protocol import inference, market, money, receipt, relay, signing
from pinaivu_node.protocol.ids import digest_of, request_id_of
from pinaivu_node.protocol.wire import Message

COORDINATOR = signing.Signer(b"c" * 32)
PROVIDER = signing.Signer(b"p" * 32)
GATEWAY = signing.Signer(b"g" * 32)

REQUEST = request_id_of(bytes(range(16)))
MODEL_DIGEST = digest_of(b"weights")
NOW = 1_700_000_000_000
PRICES = money.PriceList(input=50_000_000, cached_input=12_500_000, output=200_000_000)
USAGE = money.TokenUsage(input=30, cached_input=10, output=5)
ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/" + PROVIDER.peer_id

SAMPLING = inference.Sampling(max_tokens=5, temperature=0.5, stop=("\n",), logit_bias=((3, -1.5),))
PROMPT = inference.Prompt(nonce=bytes(16), turns=(inference.ChatTurn(role="user", content="hé"),))
RICH_SAMPLING = inference.Sampling(
    max_tokens=5,
    stop_token_ids=(7,),
    logprobs=0,
    n=2,
    constraint=inference.Constraint(kind=inference.ConstraintKind.REGEX, text="a+"),
)
CALL = inference.ToolCall(id="call_1", name="weather", arguments='{"in": "Bern"}')
RICH_PROMPT = inference.Prompt(
    nonce=bytes(16),
    turns=(
        inference.ChatTurn(role="assistant", content="", tool_calls=(CALL,)),
        inference.ChatTurn(role="tool", content="rain", tool_call_id="call_1"),
    ),
    tools=inference.ToolUse(
        tools=(inference.Tool(name="weather", description="of today", parameters="{}"),),
        choice=inference.ToolChoice.REQUIRED,
        named="weather",
        parallel=False,
    ),
)
TERMS = market.JobTerms(
    request_id=REQUEST,
    kind=market.JobKind.CHAT,
    model="smollm2:135m",
    model_digest=None,
    input_estimate=40,
    input_limit=200,
    output_estimate=5,
    output_limit=5,
    max_prices=None,
    preference=market.Preference.BALANCED,
    sampling_digest=SAMPLING.digest,
    input_commitment=PROMPT.commitment,
    deadline=NOW + 60_000,
)
POLICY = market.AuctionPolicy(
    window_ms=400,
    grace_ms=30,
    enough_bids=8,
    bid_target=16,
    standbys=2,
    price_ceiling=money.PriceList(
        input=400_000_000, cached_input=100_000_000, output=1_600_000_000
    ),
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
OFFER = market.ModelOffer(
    model="smollm2:135m",
    digest=MODEL_DIGEST,
    context_window=8192,
    capacity=1,
    prices=PRICES,
    kinds=(market.JobKind.CHAT, market.JobKind.COMPLETION),
    licence="Apache-2.0",
    owner="HuggingFaceTB",
)
BID = market.Bid(
    request_id=REQUEST,
    bidder=PROVIDER.peer_id,
    model_digest=MODEL_DIGEST,
    prices=PRICES,
    context_window=8192,
    warm_tokens=10,
    expires_at=NOW + 10_000,
)
TOKEN = market.DispatchToken(
    request_id=REQUEST,
    provider=PROVIDER.peer_id,
    gateway=GATEWAY.peer_id,
    kind_of_job=market.JobKind.CHAT,
    model="smollm2:135m",
    model_digest=MODEL_DIGEST,
    rank=0,
    input_limit=200,
    output_limit=5,
    prices=PRICES,
    uplift_ppm=1234,
    sampling_digest=SAMPLING.digest,
    input_commitment=PROMPT.commitment,
    bid_set_root=digest_of(b"root"),
    policy_hash=digest_of(b"policy"),
    issued_at=NOW,
    expires_at=NOW + 10_000,
    deadline=NOW + 60_000,
)
SEALED_TOKEN = COORDINATOR.seal(TOKEN)
VOUCHER = market.Voucher(request_id=REQUEST, provider=PROVIDER.peer_id, output_tokens=4)
PROOF = market.Proof(
    request_id=REQUEST,
    provider=PROVIDER.peer_id,
    gateway=GATEWAY.peer_id,
    model_digest=MODEL_DIGEST,
    usage=USAGE,
    output_hash=digest_of(b"text"),
    token=SEALED_TOKEN.digest,
    outcome=market.SegmentOutcome.COMPLETED,
    engine_ttft_ms=40,
    duration_ms=900,
    voucher=GATEWAY.seal(VOUCHER),
)
REPORT = market.SegmentReport(
    provider=PROVIDER.peer_id,
    usage=USAGE,
    output_hash=digest_of(b"text"),
    outcome=market.SegmentOutcome.COMPLETED,
    ttft_ms=45,
    duration_ms=910,
)
DELIVERY = market.Delivery(
    request_id=REQUEST,
    gateway=GATEWAY.peer_id,
    segments=(REPORT,),
    outcome=market.Outcome.COMPLETED,
    output_hash=digest_of(b"text"),
)
RECEIPT = receipt.Receipt(
    request_id=REQUEST,
    coordinator=COORDINATOR.peer_id,
    gateway=GATEWAY.peer_id,
    provider=PROVIDER.peer_id,
    kind_of_job=market.JobKind.CHAT,
    model="smollm2:135m",
    model_digest=MODEL_DIGEST,
    sampling_digest=SAMPLING.digest,
    input_commitment=PROMPT.commitment,
    output_hash=digest_of(b"text"),
    bid_set_root=digest_of(b"root"),
    bids=2,
    passes=1,
    policy_hash=digest_of(b"policy"),
    segments=(
        receipt.ReceiptSegment(
            provider=PROVIDER.peer_id,
            model_digest=MODEL_DIGEST,
            usage=USAGE,
            prices=PRICES,
            uplift_ppm=1234,
            amount=3,
            outcome=market.SegmentOutcome.COMPLETED,
            output_hash=digest_of(b"text"),
            ttft_ms=45,
            duration_ms=910,
            proof=PROVIDER.seal(PROOF).digest,
        ),
    ),
    amount=3,
    fee=1,
    outcome=market.Outcome.COMPLETED,
    opened_at=NOW,
    awarded_at=NOW + 8,
    settled_at=NOW + 950,
    ledger_entry=7,
    delivery=GATEWAY.seal(DELIVERY).digest,
    attestation=None,
)
AUCTION = market.AuctionRecord(
    coordinator=COORDINATOR.peer_id,
    gateway=GATEWAY.peer_id,
    terms=TERMS,
    allow=None,
    deny=(),
    policy=POLICY,
    opened_at=NOW,
    closed_at=NOW + 8,
)
MEASUREMENT = market.Measurement(
    ttft_ms=400, millitokens_per_second=20_000, reliability_ppm=900_000, samples=0
)

SAMPLES: tuple[Message, ...] = (
    SEALED_TOKEN,
    market.Hello(
        role=market.Role.PROVIDER,
        addresses=(ADDRESS,),
        software="pinaivu/0.1.0",
        incarnation=b"i" * 16,
    ),
    market.Welcome(
        heartbeat_ms=1000, now=NOW, policy=POLICY, policy_hash=digest_of(b"policy"), balance=-5
    ),
    market.Announce(models=(OFFER,), draining=False),
    market.Heartbeat(
        sequence=3, loads=(market.ModelLoad(model="smollm2:135m", running=1, queued=0),)
    ),
    market.Drain(draining=True),
    market.Roster(
        entries=(
            market.RosterEntry(
                peer=PROVIDER.peer_id,
                role=market.Role.PROVIDER,
                addresses=(ADDRESS,),
                models=(OFFER,),
            ),
        )
    ),
    market.JobRequest(
        terms=TERMS, allow=(PROVIDER.peer_id,), deny=(), fingerprints=(b"f" * 16,)
    ),
    market.JobOffer(
        terms=TERMS, gateway=GATEWAY.peer_id, fingerprints=(), threshold=2**32, closes_at=NOW + 400
    ),
    BID,
    market.Pass(
        request_id=REQUEST, bidder=PROVIDER.peer_id, reason=market.PassReason.FULL
    ),
    AUCTION,
    market.AnswerRecord(
        answer=PROVIDER.seal(BID),
        received_at=NOW + 4,
        measurement=MEASUREMENT,
        banned=False,
        full=False,
    ),
    TOKEN,
    market.Award(
        request_id=REQUEST,
        tokens=(SEALED_TOKEN,),
        contacts=(market.Contact(peer=PROVIDER.peer_id, addresses=(ADDRESS,)),),
        bids=2,
        passes=1,
        auction_ms=8,
    ),
    market.JobRefused(
        request_id=REQUEST,
        reason=market.RefusalReason.NO_BIDS,
        explanation="everyone is busy",
        retry_after_ms=1000,
    ),
    VOUCHER,
    PROOF,
    DELIVERY,
    market.Acknowledge(request_id=REQUEST, explanation="unknown request"),
    inference.Dispatch(
        request_id=REQUEST,
        token=SEALED_TOKEN,
        prompt=RICH_PROMPT,
        sampling=RICH_SAMPLING,
        resume_token_ids=(1, 2),
        tenant=b"t" * 32,
        fingerprints=(b"f" * 16,),
    ),
    inference.Accept(request_id=REQUEST),
    inference.Refuse(
        request_id=REQUEST, reason=inference.RefuseReason.REPLAYED, explanation="seen before"
    ),
    inference.Tokens(
        deltas=(
            inference.TokenDelta(request_id=REQUEST, position=0, token_ids=(5, 6), text="hé"),
            inference.TokenDelta(
                request_id=REQUEST,
                position=2,
                token_ids=(7,),
                text="",
                logprobs=(
                    inference.TokenLogprob(
                        chosen=(7, b"\xc3", -0.5), top=((7, b"\xc3", -0.5), (8, b"a", -9999.0))
                    ),
                ),
                tool_calls=(
                    inference.ToolCallDelta(index=0, id="call_1", name="weather", arguments="{"),
                ),
            ),
            inference.TokenDelta(
                request_id=REQUEST,
                position=3,
                token_ids=(),
                text="",
                index=1,
                finish=inference.Finish.LENGTH,
            ),
        )
    ),
    inference.Done(
        request_id=REQUEST, finish=inference.Finish.STOP, proof=PROVIDER.seal(PROOF)
    ),
    inference.Cancel(request_id=REQUEST),
    RECEIPT,
    receipt.ReceiptRequest(request_id=REQUEST),
    receipt.ReceiptReply(
        request_id=REQUEST,
        receipt=COORDINATOR.seal(RECEIPT),
        proofs=(PROVIDER.seal(PROOF),),
        delivery=GATEWAY.seal(DELIVERY),
    ),
    receipt.BidSetRequest(request_id=REQUEST),
    receipt.BidSetReply(request_id=REQUEST, leaves=(b"leaf",)),
    relay.Reach(target=PROVIDER.peer_id),
    relay.Incoming(source=GATEWAY.peer_id),
    relay.Reached(),
    relay.Unreached(reason="it is not connected here"),
)  # fmt: skip
