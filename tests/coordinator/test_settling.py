"""From award to receipt, told on the memory mesh."""

from __future__ import annotations

import random

import pytest
import sqlalchemy as sa
import trio
from market_town import (
    START,
    USAGE,
    Peer,
    Provider,
    Town,
    make_delivery,
    make_proof,
    make_report,
    make_terms,
    make_voucher,
    open_town,
    request_id,
)

from pinaivu_node.coordinator.auction import decide, open_bid_set_untrusted
from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.ledger import (
    TREASURY,
    gateway_account,
    hold_account,
    provider_account,
)
from pinaivu_node.coordinator.pace import Pace
from pinaivu_node.coordinator.schema import jobs
from pinaivu_node.coordinator.sessions import Session
from pinaivu_node.coordinator.settlement import billed_usage
from pinaivu_node.mesh.mesh import StreamLost
from pinaivu_node.protocol.market import (
    Acknowledge,
    Award,
    DispatchToken,
    Heartbeat,
    Hello,
    JobRefused,
    JobRequest,
    Outcome,
    Role,
    SegmentOutcome,
)
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.money import ZERO_USAGE, TokenUsage
from pinaivu_node.protocol.receipt import (
    BidSetReply,
    BidSetRequest,
    Receipt,
    ReceiptReply,
    ReceiptRequest,
)
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.topics import LOG
from pinaivu_node.protocol.wire import decode_untrusted, encode
from pinaivu_node.verification import Evidence, Expectation, Verdict, verify

LONG = {"deadline": START + 3_000_000}


async def awarded(gateway: Peer, number: int = 1, **terms) -> Award:
    await gateway.say(JobRequest(terms=make_terms(number, **LONG | terms)))
    return await gateway.heard(Award)


async def receipt_of(town: Town, peer: Peer) -> Receipt:
    return open_untrusted(await peer.heard(Envelope), Receipt, signer=town.peer_id)


async def balance(town: Town, account) -> int:
    return (await town.coordinator.accounts()).get(account, 0)


async def test_proof_and_delivery_make_one_receipt_that_both_are_told(town, autojump_clock):
    provider, gateway = await town.provider("one"), await town.gateway()
    award = await awarded(gateway)
    await provider.state(make_proof(award.tokens[0], provider.signer))
    await gateway.state(make_delivery(gateway.peer_id, make_report(provider.peer_id)))
    envelope = await gateway.heard(Envelope)
    assert await provider.heard(Envelope) == envelope
    receipt = open_untrusted(envelope, Receipt, signer=town.peer_id)
    assert receipt.outcome is Outcome.COMPLETED
    assert receipt.amount == 120_000  # alone, it is paid the ceiling
    assert await balance(town, provider_account(provider.peer_id)) == 117_600
    assert await balance(town, gateway_account(gateway.peer_id)) == 10**12 - 120_000
    assert await balance(town, "fee") == receipt.fee == 2_400


async def test_whoever_asks_again_is_told_again(town, autojump_clock):
    provider, gateway = await town.provider("one"), await town.gateway()
    award = await awarded(gateway)
    proof = make_proof(award.tokens[0], provider.signer)
    delivery = make_delivery(gateway.peer_id, make_report(provider.peer_id))
    await provider.state(proof)
    await gateway.state(delivery)
    first = await gateway.heard(Envelope)
    await provider.heard(Envelope)
    for _ in range(2):
        await provider.state(proof)
        assert await provider.heard(Envelope) == first
        await gateway.state(delivery)
        assert await gateway.heard(Envelope) == first
    assert town.coordinator.statistics().settlements == {Outcome.COMPLETED: 1}


async def test_what_no_receipt_can_come_of_is_acknowledged(town, autojump_clock):
    gateway = await town.gateway()
    await gateway.state(make_delivery(gateway.peer_id, number=5))
    assert (await gateway.heard(Acknowledge)).request_id == request_id(5)


async def test_without_a_proof_the_gateways_admission_is_paid_after_a_grace(town, autojump_clock):
    provider, gateway = await town.provider("one"), await town.gateway()
    await awarded(gateway)
    await gateway.state(make_delivery(gateway.peer_id, make_report(provider.peer_id)))
    before = trio.current_time()
    receipt = await receipt_of(town, gateway)
    assert 9.9 <= trio.current_time() - before <= 11.1
    assert receipt.amount == 120_000
    assert receipt.segments[0].proof is None


async def test_a_gateway_that_vanishes_pays_what_it_vouched_for(town, autojump_clock):
    provider, gateway = await town.provider("one"), await town.gateway()
    award = await awarded(gateway)
    town.network.crash(gateway.peer_id)
    voucher = make_voucher(gateway.signer, provider.peer_id, 32)
    await provider.state(make_proof(award.tokens[0], provider.signer, voucher=voucher))
    receipt = await receipt_of(town, provider)
    assert receipt.outcome is Outcome.ABANDONED
    assert receipt.segments[0].usage.output == 32
    assert receipt.delivery is None


async def test_a_job_of_which_nothing_is_heard_releases_its_hold(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway(credit=240_000)
    await awarded(gateway, deadline=START + 30_000)
    assert await balance(town, gateway_account(gateway.peer_id)) == 0
    receipt = await receipt_of(town, gateway)
    assert 40_000 <= receipt.settled_at - START <= 41_500
    assert (receipt.outcome, receipt.amount) == (Outcome.ABANDONED, 0)
    assert await balance(town, gateway_account(gateway.peer_id)) == 240_000


async def test_a_gateway_that_gives_up_is_settled_at_once(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway()
    await awarded(gateway)
    await gateway.state(make_delivery(gateway.peer_id, outcome=Outcome.FAILED))
    receipt = await receipt_of(town, gateway)
    assert (receipt.outcome, receipt.amount) == (Outcome.FAILED, 0)


async def test_a_standby_that_served_is_paid_and_the_dead_winner_ranks_lower(town, autojump_clock):
    one, two = await town.provider("one"), await town.provider("two")
    gateway = await town.gateway()
    award = await awarded(gateway)
    by_name = {one.peer_id: one, two.peer_id: two}
    winner, standby = (by_name[contact.peer] for contact in award.contacts)
    died = make_report(winner.peer_id, usage=ZERO_USAGE, outcome=SegmentOutcome.DIED, ttft_ms=None)
    await standby.state(make_proof(award.tokens[1], standby.signer))
    await gateway.state(make_delivery(gateway.peer_id, died, make_report(standby.peer_id)))
    receipt = await receipt_of(town, gateway)
    assert receipt.provider == winner.peer_id
    assert [(part.provider, part.amount > 0) for part in receipt.segments] == [
        (winner.peer_id, False), (standby.peer_id, True),
    ]  # fmt: skip
    award = await awarded(gateway, 2)
    assert [contact.peer for contact in award.contacts] == [standby.peer_id, winner.peer_id]


async def test_statements_that_do_not_belong_to_the_job_are_ignored(town, autojump_clock):
    provider, gateway = await town.provider("one"), await town.gateway()
    award = await awarded(gateway)
    other, thief = await town.gateway("other"), await town.provider("thief", model="other")
    await other.state(make_delivery(other.peer_id))
    await thief.state(make_proof(award.tokens[0], thief.signer))
    await trio.sleep(1)
    statistics = town.coordinator.statistics()
    assert (statistics.messages_ignored, statistics.open_jobs) == (2, 1)
    await provider.state(make_proof(award.tokens[0], provider.signer))
    await gateway.state(make_delivery(gateway.peer_id, make_report(provider.peer_id)))
    assert (await receipt_of(town, gateway)).amount == 120_000


STATEMENTS = {
    "both agree": (USAGE, USAGE, None),
    "the gateway says less": (USAGE, ZERO_USAGE, None),
    "the gateway says less than it vouched for": (USAGE, ZERO_USAGE, 32),
    "no proof": (None, USAGE, None),
    "no delivery": (USAGE, None, 32),
    "nothing": (None, None, None),
    "too much": (USAGE.model_copy(update={"output": 999}),) * 2 + (None,),
}


@pytest.mark.parametrize(("proven", "reported", "voucher"), STATEMENTS.values(), ids=STATEMENTS)
async def test_every_receipt_stands_up_to_its_verification(
    town, autojump_clock, proven, reported, voucher
):
    provider, gateway = await town.provider("one"), await town.gateway()
    award = await awarded(gateway, deadline=START + 10_000)
    if proven is not None:
        vouched = voucher and make_voucher(gateway.signer, provider.peer_id, voucher)
        proof = make_proof(award.tokens[0], provider.signer, usage=proven, voucher=vouched)
        await provider.state(proof)
    if reported is not None:
        report = make_report(provider.peer_id, usage=reported)
        await gateway.state(make_delivery(gateway.peer_id, report))
    await gateway.heard(Envelope)
    stream = await (await town.join("anyone")).open(town.peer_id, LOG)
    reply = await asked(stream, ReceiptRequest(request_id=request_id()))
    leaves = (await asked(stream, BidSetRequest(request_id=request_id()))).leaves
    evidence = Evidence(reply.receipt, reply.proofs, reply.delivery, leaves)
    checks = list(verify(evidence, Expectation(request_id(), town.peer_id)))
    assert len(checks) >= 8
    assert [check for check in checks if check.verdict is Verdict.FAILS] == []


@pytest.mark.parametrize(("claimed", "cold"), [(0, 100), (60, 40), (10**6, 0)])
async def test_a_claim_of_warm_tokens_is_what_is_paid(town, autojump_clock, claimed, cold):
    provider, gateway = await town.provider("one"), await town.gateway()
    provider.answer = lambda offer: provider.usual(offer, warm_tokens=claimed)
    await provider.state(make_proof((await awarded(gateway)).tokens[0], provider.signer))
    await gateway.state(make_delivery(gateway.peer_id, make_report(provider.peer_id)))
    [segment] = (await receipt_of(town, gateway)).segments
    assert segment.usage == TokenUsage(input=cold, cached_input=100 - cold, output=USAGE.output)
    stream = await (await town.join("anyone")).open(town.peer_id, LOG)
    leaves = (await asked(stream, BidSetRequest(request_id=request_id()))).leaves
    record, answers = open_bid_set_untrusted(leaves)
    report = make_report(provider.peer_id)
    [award] = decide(record, answers).awards
    again = billed_usage(award, record.terms, report=report, proof=None, delivered=0)
    assert again == segment.usage  # by anyone, from what the coordinator serves


# --- restarts -------------------------------------------------------------------------------------


async def test_a_restart_keeps_jobs_books_and_measurements(autojump_clock, database):
    async with open_town(database) as town:
        provider, gateway = await town.provider("one"), await town.gateway()
        one, two = await awarded(gateway, 1), await awarded(gateway, 2)
        proofs = [make_proof(award.tokens[0], provider.signer) for award in (one, two)]
        await provider.state(proofs[0])
        await gateway.state(make_delivery(gateway.peer_id, make_report(provider.peer_id)))
        first = await gateway.heard(Envelope)
    async with open_town(database) as town:
        assert town.coordinator.statistics().open_jobs == 1
        provider, gateway = await town.provider("one"), await town.gateway(credit=0)
        delivery = make_delivery(gateway.peer_id, make_report(provider.peer_id))
        await gateway.state(delivery)
        assert await gateway.heard(Envelope) == first
        await provider.state(proofs[1])
        await gateway.state(delivery.model_copy(update={"request_id": request_id(2)}))
        second = await receipt_of(town, gateway)
        assert second.amount == 120_000
        dispatch = open_untrusted(two.tokens[0], DispatchToken, signer=town.peer_id)
        assert second.bid_set_root == dispatch.bid_set_root
        assert second.policy_hash == dispatch.policy_hash
        assert len(await town.store.tracks()) == 1
        await gateway.say(JobRequest(terms=make_terms(1)))
        await gateway.heard(JobRefused)


async def test_a_stored_job_that_cannot_be_read_stops_no_other(autojump_clock, database):
    async with open_town(database) as town:
        await town.provider("one")
        gateway = await town.gateway()
        await awarded(gateway, 1)
        await awarded(gateway, 2)
        spoil = sa.update(jobs).where(jobs.c.request_id == request_id(1)).values(award=b"\x00")
        await town.store._transact(lambda connection: connection.execute(spoil))
    async with open_town(database) as town:
        assert town.coordinator.statistics().open_jobs == 1
        await trio.sleep(3_700)
        assert town.coordinator.statistics().settlements == {Outcome.ABANDONED: 1}
        assert await balance(town, hold_account(request_id(1))) > 0


async def test_after_a_restart_a_job_that_nobody_speaks_of_ends(autojump_clock, database):
    async with open_town(database) as town:
        await town.provider("one")
        gateway = await town.gateway(credit=240_000)
        await awarded(gateway)
    async with open_town(database) as town:
        await trio.sleep(3_100)
        assert await balance(town, gateway_account(gateway.peer_id)) == 240_000
        assert town.coordinator.statistics().settlements == {Outcome.ABANDONED: 1}


# --- the log --------------------------------------------------------------------------------------


async def asked(stream, question):
    await stream.send(encode(question))
    return decode_untrusted(await stream.receive(), ReceiptReply, BidSetReply)


async def test_anyone_can_fetch_the_receipt_and_replay_the_auction(town, autojump_clock):
    providers = [await town.provider(name) for name in ("one", "two")]
    gateway = await town.gateway()
    award = await awarded(gateway)
    mesh = await town.join("anyone")
    stream = await mesh.open(town.peer_id, LOG)
    assert (await asked(stream, ReceiptRequest(request_id=request_id()))).receipt is None
    [winner] = [each for each in providers if each.peer_id == award.contacts[0].peer]
    await winner.state(make_proof(award.tokens[0], winner.signer))
    await gateway.state(make_delivery(gateway.peer_id, make_report(winner.peer_id)))
    envelope = await gateway.heard(Envelope)
    receipt = open_untrusted(envelope, Receipt, signer=town.peer_id)
    reply = await asked(stream, ReceiptRequest(request_id=request_id()))
    assert reply.receipt == envelope
    assert reply.delivery.digest == receipt.delivery
    assert [proof.digest for proof in reply.proofs] == [
        part.proof for part in receipt.segments if part.proof
    ]
    leaves = (await asked(stream, BidSetRequest(request_id=request_id()))).leaves
    assert tree_root(leaves) == receipt.bid_set_root
    awards = decide(*open_bid_set_untrusted(leaves)).awards
    tokens = [open_untrusted(each, DispatchToken, signer=town.peer_id) for each in award.tokens]
    assert [(each.provider, each.uplift_ppm) for each in awards] == [
        (token.provider, token.uplift_ppm) for token in tokens
    ]
    assert (await asked(stream, BidSetRequest(request_id=request_id(9)))).leaves is None


async def test_whoever_asks_the_log_too_fast_is_answered_slowly(town, autojump_clock):
    mesh = await town.join("anyone")
    streams = [await mesh.open(town.peer_id, LOG) for _ in range(2)]
    before = trio.current_time()

    async def ask_often(stream):
        for _ in range(100):
            await asked(stream, ReceiptRequest(request_id=request_id()))

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(ask_often, stream)
    # 200 questions at 50 a second, the first 50 for nothing
    assert trio.current_time() - before >= 3


# --- slow peers, and many -------------------------------------------------------------------------


async def test_a_peer_that_does_not_read_is_dropped(town, autojump_clock):
    mesh = await town.join("somebody")
    stream = await mesh.open(town.peer_id, LOG)
    session = Session(stream, Hello(role=Role.GATEWAY, addresses=(), software=""), Pace(100, now=0))
    for _ in range(5):
        session.send(bytes(1 << 20))
    with pytest.raises(StreamLost):
        await stream.receive()
    session.send(b"more")  # harmless


async def test_a_peer_that_talks_too_fast_is_read_slowly_and_the_others_are_not(
    autojump_clock, database
):
    async with open_town(database, CoordinatorConfig(messages_per_second=50)) as town:
        await town.provider("one")
        loud, gateway = await town.gateway("loud"), await town.gateway()
        for number in range(200):
            await loud.say(Heartbeat(sequence=number))
        await loud.say(JobRequest(terms=make_terms(1)))
        before = trio.current_time()
        await awarded(gateway, 2)
        assert trio.current_time() - before < 0.1
        await loud.heard(Award)
        assert trio.current_time() - before > 2


async def test_a_hundred_jobs_of_every_kind_lose_and_invent_no_money(town, autojump_clock):
    dice = random.Random(7)
    providers = {each.peer_id: each for each in [await town.provider(f"p{n}") for n in range(4)]}
    gateways = [await town.gateway(f"g{n}", credit=10**8) for n in range(2)]

    async def one_job(gateway: Peer, number: int) -> None:
        await gateway.say(JobRequest(terms=make_terms(number, deadline=START + 300_000)))
        answer = await gateway.heard(Award, JobRefused)
        if isinstance(answer, JobRefused):
            return
        winner: Provider = providers[answer.contacts[0].peer]
        if dice.random() < 0.8:
            used = USAGE.model_copy(update={"output": dice.randrange(0, 150)})
            await winner.state(make_proof(answer.tokens[0], winner.signer, usage=used))
        if dice.random() < 0.8:
            used = USAGE.model_copy(update={"output": dice.randrange(0, 150)})
            report = make_report(winner.peer_id, usage=used)
            await gateway.state(make_delivery(gateway.peer_id, report, number=number))
            await trio.sleep(12)
        while gateway._receive.statistics().current_buffer_used:
            await gateway.heard(Envelope)

    async def many_jobs(gateway: Peer, first: int) -> None:
        for number in range(first, first + 20):
            await one_job(gateway, number)

    async with trio.open_nursery() as nursery:
        for place, gateway in enumerate(gateways):
            nursery.start_soon(many_jobs, gateway, 1 + 100 * place)
    await trio.sleep(400)
    accounts = await town.coordinator.accounts()
    assert sum(accounts.values()) == 0
    assert not [account for account in accounts if account.startswith("hold:")]
    assert all(amount > 0 for account, amount in accounts.items() if account != TREASURY)
    assert accounts[TREASURY] == -2 * 10**8
    assert town.coordinator.statistics().open_jobs == 0
