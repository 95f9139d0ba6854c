"""A provider's whole life, told by the messages that the others see."""

from __future__ import annotations

import trio

from pinaivu_node.protocol.inference import Finish, RefuseReason, Sampling
from pinaivu_node.protocol.market import (
    Announce,
    Bid,
    Heartbeat,
    Pass,
    PassReason,
    Proof,
    SegmentOutcome,
)


async def test_a_job_goes_from_the_offer_to_the_money(autojump_clock, world, facts, text_hash):
    async with world.market() as (coordinator, provider, gateway):
        announce = await coordinator.wait_for(Announce)
        assert announce.models[0].capacity == 4
        offer = await coordinator.offer()
        bid = await coordinator.wait_for(Bid, request_id=offer.terms.request_id)
        assert bid.prices == facts.prices

        request = await gateway.dispatch(request_id=offer.terms.request_id)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.LENGTH
        assert len(gateway.ids[request]) == proof.usage.output == 32
        assert proof.output_hash == text_hash(gateway.text[request])
        assert proof.outcome is SegmentOutcome.COMPLETED
        assert proof.engine_ttft_ms > 0

        assert await coordinator.wait_for(Proof, request_id=request) == proof
        await coordinator.say(facts.coordinator.seal(facts.receipt(proof)))
        await trio.sleep(1)
        statistics = provider.statistics()
        assert statistics.earnings > 0
        assert statistics.unpaid_proofs == 0
        assert statistics.last_jobs[0].paid == statistics.earnings
        assert (statistics.bids, statistics.won, statistics.finished) == (1, 1, 1)


async def test_the_coordinator_hears_when_there_is_no_free_place(autojump_clock, world):
    async with world.market() as (coordinator, _, gateway):
        for _ in range(4):
            await gateway.dispatch(sampling=Sampling(max_tokens=300))
        await gateway.until(lambda: len(gateway.accepted) == 4)
        offer = await coordinator.offer()
        answer = await coordinator.wait_for(Pass, request_id=offer.terms.request_id)
        assert answer.reason is PassReason.FULL
        await gateway.until(lambda: len(gateway.done) == 4)
        offer = await coordinator.offer()
        await coordinator.wait_for(Bid, request_id=offer.terms.request_id)
        loads = [each.loads[0].running for each in coordinator.heard if isinstance(each, Heartbeat)]
        assert max(loads) == 4
        assert loads[-1] < 4


async def test_a_refused_dispatch_costs_nothing_and_says_why(autojump_clock, world, facts):
    async with world.market() as (_, provider, gateway):
        request = await gateway.dispatch(signer=facts.stranger)
        refuse = await gateway.wait_refused(request)
        assert refuse.reason is RefuseReason.WRONG_SIGNER
        assert provider.statistics().refusals == {RefuseReason.WRONG_SIGNER: 1}
        assert world.engine.statistics().generated_tokens == 0


async def test_a_token_works_once(autojump_clock, world, facts):
    async with world.market() as (_, _, gateway):
        dispatch = facts.dispatch(now=world.clock())
        request = await gateway.dispatch(dispatch)
        await gateway.wait_done(request)
        await gateway.dispatch(dispatch)
        refuse = await gateway.wait_refused(request)
        assert refuse.reason is RefuseReason.REPLAYED


async def test_cancel_stops_the_engine_within_a_step(autojump_clock, world):
    async with world.market() as (coordinator, _, gateway):
        request = await gateway.dispatch(sampling=Sampling(max_tokens=3000))
        await gateway.wait_tokens(request, 10)
        await gateway.cancel(request)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.CANCELLED
        assert proof.outcome is SegmentOutcome.CANCELLED
        # 5 ms each way at 100 tokens a second: one token was on its way.
        assert 10 <= proof.usage.output == len(gateway.ids[request]) <= 12
        assert world.engine.statistics().running == 0
        await coordinator.wait_for(Proof, request_id=request)


async def test_a_lost_gateway_stops_its_jobs_and_what_was_sent_is_proven(autojump_clock, world):
    async with world.coordinate() as coordinator, world.provide() as provider:
        await coordinator.wait_for(Announce)
        async with world.buy() as gateway:
            request = await gateway.dispatch(sampling=Sampling(max_tokens=3000))
            await gateway.wait_tokens(request, 10)
        proof = await coordinator.wait_for(Proof, request_id=request)
        assert proof.outcome is SegmentOutcome.CANCELLED
        assert 10 <= proof.usage.output <= 13
        assert provider.statistics().running == ()
        assert provider.statistics().gateways == 0


async def test_a_gateway_that_never_vouches_loses_its_job(autojump_clock, world):
    async with world.market(vouches=False, max_unvouched_tokens=100) as (_, _, gateway):
        request = await gateway.dispatch(sampling=Sampling(max_tokens=3000))
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.ERROR
        assert "vouched" in done.explanation
        assert proof.outcome is SegmentOutcome.STALLED
        assert 100 < proof.usage.output <= 103


async def test_a_gateway_that_vouches_gets_the_whole_answer(autojump_clock, world, facts):
    async with world.market(max_unvouched_tokens=200) as (_, _, gateway):
        request = await gateway.dispatch(sampling=Sampling(max_tokens=1000))
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.LENGTH
        assert proof.usage.output == 1000
        assert proof.voucher is not None
        assert proof.voucher.signer == facts.gateway.peer_id


async def test_a_proof_is_told_again_after_every_reconnection_until_its_receipt(
    autojump_clock, world, facts
):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch()
        _, proof = await gateway.wait_done(request)
        await coordinator.wait_for(Proof, request_id=request)
        for sessions in (2, 3):
            coordinator.stream.reset()
            await trio.sleep(10)
            assert coordinator.sessions == sessions
            assert coordinator.proofs[request] == [proof] * sessions
        await coordinator.say(facts.coordinator.seal(facts.receipt(proof)))
        await trio.sleep(1)
        coordinator.stream.reset()
        await trio.sleep(10)
        assert len(coordinator.proofs[request]) == 3
        assert provider.statistics().unpaid_proofs == 0


async def test_sixty_four_answers_leave_in_one_frame_per_step(autojump_clock, world, facts):
    from pinaivu_node.engine.synthetic import SyntheticEngine

    engine = SyntheticEngine(tokens_per_second=50.0, capacity=64)
    async with world.market(engine=engine) as (_, _, gateway):
        requests = [await gateway.dispatch(sampling=Sampling(max_tokens=100)) for _ in range(64)]
        for request in requests:
            _, proof = await gateway.wait_done(request)
            assert proof.usage.output == len(gateway.ids[request]) == 100
        assert gateway.frames_with_tokens <= 110
