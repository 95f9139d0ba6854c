"""What a provider does when others, or its own engine, do not do their part."""

from __future__ import annotations

import dataclasses
from contextlib import aclosing, asynccontextmanager

import pytest
import trio

from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import EngineBusy, EngineDead, PromptRefused
from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.protocol.inference import Finish, RefuseReason, Sampling
from pinaivu_node.protocol.market import (
    Acknowledge,
    Announce,
    Bid,
    Pass,
    PassReason,
    Proof,
    Role,
    Roster,
    RosterEntry,
    SegmentOutcome,
)
from pinaivu_node.protocol.money import ZERO_USAGE
from pinaivu_node.protocol.topics import INFERENCE, jobs_topic
from pinaivu_node.provider.proofs import ProofSpool


class FragileEngine(SyntheticEngine):
    """Speaks like the other until it fails: at the door, or after so many tokens."""

    def __init__(self, *, at_door=None, after=None, **settings) -> None:
        super().__init__(**settings)
        self.at_door, self.after = at_door, after
        self.ready = True

    @asynccontextmanager
    async def generate(self, request):
        if self.at_door is not None:
            raise self.at_door
        async with (
            super().generate(request) as events,
            aclosing(self._fragile(events)) as fragile,
        ):
            yield fragile

    async def _fragile(self, events):
        tokens = 0
        async for event in events:
            yield event
            tokens += len(event.token_ids)
            if self.after is not None and tokens >= self.after:
                raise self.error

    error = EngineDead("the engine was killed by signal 9")

    def statistics(self):
        return dataclasses.replace(super().statistics(), ready=self.ready)


@pytest.fixture
def long():
    return Sampling(max_tokens=3000)


# --- the engine -----------------------------------------------------------------------------------


async def test_an_engine_that_dies_ends_its_job_and_what_was_sent_is_proven(
    autojump_clock, world, long
):
    async with world.market(engine=FragileEngine(after=20)) as (coordinator, _, gateway):
        request = await gateway.dispatch(sampling=long)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.ERROR
        assert "signal 9" in done.explanation
        assert proof.usage.output == len(gateway.ids[request]) == 20
        assert proof.outcome is SegmentOutcome.ERROR
        await coordinator.wait_for(Proof, request_id=request)


async def test_a_bug_in_one_job_is_its_own(autojump_clock, world, long, caplog):
    engine = FragileEngine(after=5)
    engine.error = ZeroDivisionError("a bug")
    async with world.market(engine=engine) as (_, _, gateway):
        request = await gateway.dispatch(sampling=long)
        done, _ = await gateway.wait_done(request)
        assert done.finish is Finish.ERROR
        assert "a bug" not in done.explanation
        assert "ZeroDivisionError" in caplog.text
        engine.after = None
        _, proof = await gateway.wait_done(await gateway.dispatch())
        assert proof.usage.output == 32


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineBusy("no room"), RefuseReason.FULL),
        (PromptRefused("too long"), RefuseReason.PROMPT_REFUSED),
        (EngineDead("restarting"), RefuseReason.ENGINE_UNAVAILABLE),
    ],
)
async def test_what_the_engine_will_not_begin_is_refused(autojump_clock, world, error, reason):
    async with world.market(engine=FragileEngine(at_door=error)) as (
        coordinator,
        provider,
        gateway,
    ):
        request = await gateway.dispatch()
        refuse = await gateway.wait_refused(request)
        assert refuse.reason is reason
        assert refuse.explanation == str(error)
        await trio.sleep(1)
        assert coordinator.proofs == {}
        assert provider.statistics().running == ()
        assert provider.statistics().models[0].running == 0


class SlowDoorEngine(SyntheticEngine):
    """Takes a second to take a request in."""

    @asynccontextmanager
    async def generate(self, request):
        await trio.sleep(1)
        async with super().generate(request) as events:
            yield events


async def test_a_job_may_be_cancelled_at_the_engines_door(autojump_clock, world):
    async with world.market(engine=SlowDoorEngine()) as (coordinator, provider, gateway):
        request = await gateway.dispatch()
        await trio.sleep(0.1)
        await gateway.cancel(request)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.CANCELLED
        assert proof.usage == ZERO_USAGE
        assert provider.statistics().models[0].running == 0
        await coordinator.wait_for(Proof, request_id=request)


async def test_a_model_whose_engine_is_down_is_not_for_sale(autojump_clock, world):
    engine = FragileEngine()
    engine.ready = False
    async with world.coordinate() as coordinator, world.provide(engine=engine):
        await coordinator.wait_for(Announce, models=())
        offer = await coordinator.offer()
        answer = await coordinator.wait_for(Pass, request_id=offer.terms.request_id)
        assert answer.reason is PassReason.ENGINE_UNAVAILABLE
        engine.ready = True
        await trio.sleep(2)
        announces = [each for each in coordinator.heard if isinstance(each, Announce)]
        assert len(announces) == 2
        assert len(announces[1].models) == 1


# --- gateways -------------------------------------------------------------------------------------


async def test_a_prompt_over_the_auctioned_limit_is_stopped_and_free(autojump_clock, world, facts):
    async with world.market() as (_, _, gateway):
        prompt = facts.prompt("x" * 400)
        request = await gateway.dispatch(prompt=prompt, input_limit=90)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.ERROR
        assert "over_limits" in done.explanation
        assert proof.usage == ZERO_USAGE
        assert gateway.ids[request] == []


async def test_nobody_works_past_the_deadline(autojump_clock, world, long):
    async with world.market() as (_, _, gateway):
        request = await gateway.dispatch(sampling=long, deadline=world.clock() + 1000)
        done, proof = await gateway.wait_done(request)
        assert done.finish is Finish.ERROR
        assert "deadline" in done.explanation
        assert 80 < proof.usage.output < 100


async def test_a_gateway_that_stops_reading_loses_its_jobs_and_nobody_waits(
    autojump_clock, world, long
):
    engine = SyntheticEngine(tokens_per_second=1000, capacity=64)
    settings = {"max_outbound_bytes": 20_000, "max_unvouched_tokens": 10**6}
    async with (
        world.coordinate() as coordinator,
        world.provide(engine=engine, **settings) as provider,
    ):
        await coordinator.wait_for(Announce)
        async with world.buy() as gateway:
            first = await gateway.dispatch(sampling=long)
            await gateway.wait_tokens(first, 1)
            gateway.scope.cancel()  # of its reader
            for _ in range(40):
                await gateway.dispatch(sampling=long)
            proof = await coordinator.wait_for(Proof, request_id=first)
            assert proof.outcome is SegmentOutcome.STALLED
            await trio.sleep(1)
            assert provider.statistics().running == ()


async def test_a_second_stream_of_a_gateway_takes_the_first_ones_place(
    autojump_clock, world, facts, long
):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch(sampling=long)
        await gateway.wait_tokens(request, 5)
        await gateway.mesh.open(facts.provider.peer_id, INFERENCE)
        proof = await coordinator.wait_for(Proof, request_id=request)
        assert proof.outcome is SegmentOutcome.CANCELLED
        await gateway.until(lambda: gateway.failure is not None)
        assert provider.statistics().gateways == 1


async def test_idle_streams_give_way_to_new_ones(autojump_clock, world, long):
    async with world.market(max_streams=2) as (_, provider, busy):
        request = await busy.dispatch(sampling=long)
        await busy.wait_tokens(request, 1)
        async with world.buy(name="second") as second, world.buy(name="third") as third:
            await second.until(lambda: second.failure is not None)
            assert provider.statistics().gateways == 2
            assert busy.failure is third.failure is None


async def test_a_dispatch_meant_for_another_gateway_is_refused(autojump_clock, world, facts):
    async with world.market(), world.buy(name="thief") as thief:
        request = await thief.dispatch()
        assert (await thief.wait_refused(request)).reason is RefuseReason.OTHER_GATEWAY


async def test_one_who_goes_on_forging_is_cut_off(autojump_clock, world, facts):
    async with world.market() as (_, _, gateway):
        for _ in range(33):
            await gateway.dispatch(signer=facts.stranger)
        await gateway.until(lambda: gateway.failure is not None)
        assert len(gateway.refused) <= 33


async def test_rubbish_ends_the_connection_of_its_sender_alone(autojump_clock, world, long):
    async with world.market() as (_, _, gateway):
        request = await gateway.dispatch(sampling=Sampling(max_tokens=200))
        async with world.buy(name="vandal") as vandal:
            await vandal.stream.send(b"\xff" * 100)
            await vandal.until(lambda: vandal.failure is not None)
        done, _ = await gateway.wait_done(request)
        assert done.finish is Finish.LENGTH


@pytest.mark.parametrize("who", ["stranger", "coordinator"])
async def test_a_voucher_must_be_the_gateways_own(autojump_clock, world, facts, long, who):
    async with world.market() as (_, _, gateway):
        request = await gateway.dispatch(sampling=long)
        await gateway.wait_tokens(request, 5)
        await gateway.vouch(request, 5, signer=getattr(facts, who))
        await gateway.until(lambda: gateway.failure is not None)


async def test_cancelling_what_is_not_there_harms_nobody(autojump_clock, world, facts):
    async with world.market() as (_, _, gateway):
        await gateway.cancel(facts.request_id())
        request = await gateway.dispatch()
        await gateway.wait_done(request)
        await gateway.cancel(request)
        await gateway.vouch(request, 32)
        await gateway.wait_done(await gateway.dispatch())


# --- the coordinator ------------------------------------------------------------------------------


async def test_offers_of_others_and_old_offers_are_not_answered(autojump_clock, world, facts):
    async with world.market() as (coordinator, provider, gateway):
        offer = facts.offer(closes_at=world.clock() + 400)
        await coordinator.publish(offer, signer=facts.stranger)
        await coordinator.publish(facts.offer(closes_at=world.clock()))
        topic = jobs_topic(facts.model)
        await coordinator.mesh.publish(topic, b"rubbish")
        await gateway.mesh.publish(topic, b"from somebody else")
        await trio.sleep(1)
        assert provider.statistics().rejected_messages == 3
        assert not any(isinstance(each, Bid | Pass) for each in coordinator.heard)
        good = await coordinator.offer()
        await coordinator.publish(good)
        await trio.sleep(1)
        assert len([each for each in coordinator.heard if isinstance(each, Bid)]) == 1


async def test_draining_lets_the_running_jobs_finish(autojump_clock, world):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch(sampling=Sampling(max_tokens=200))
        await gateway.wait_tokens(request, 1)
        provider.drain()
        await coordinator.wait_for(Announce, draining=True)
        refused = await gateway.dispatch()
        assert (await gateway.wait_refused(refused)).reason is RefuseReason.DRAINING
        offer = await coordinator.offer()
        answer = await coordinator.wait_for(Pass, request_id=offer.terms.request_id)
        assert answer.reason is PassReason.DRAINING
        done, _ = await gateway.wait_done(request)
        assert done.finish is Finish.LENGTH
        provider.resume()
        await gateway.wait_done(await gateway.dispatch())


async def test_a_silent_coordinator_is_given_up_and_found_again(autojump_clock, world, facts):
    async with world.market() as (coordinator, provider, _):
        world.network.hang(facts.coordinator.peer_id)
        await trio.sleep(10)
        assert not provider.statistics().connected
        world.network.resume(facts.coordinator.peer_id)
        await trio.sleep(5)
        assert provider.statistics().connected
        assert coordinator.sessions == 2
        offer = await coordinator.offer()
        await coordinator.wait_for(Bid, request_id=offer.terms.request_id)


async def test_a_coordinator_may_come_later_than_its_providers(autojump_clock, world):
    async with world.provide() as provider:
        await trio.sleep(60)
        assert not provider.statistics().connected
        async with world.coordinate() as coordinator:
            await coordinator.wait_for(Announce)
            assert provider.statistics().connected


async def test_an_acknowledged_proof_is_not_sent_again(autojump_clock, world):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch()
        await gateway.wait_done(request)
        await coordinator.wait_for(Proof, request_id=request)
        await coordinator.say(Acknowledge(request_id=request, explanation="never auctioned"))
        await trio.sleep(1)
        assert provider.statistics().unpaid_proofs == 0


async def test_a_receipt_of_another_signer_pays_nothing(autojump_clock, world, facts):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch()
        _, proof = await gateway.wait_done(request)
        await coordinator.say(facts.stranger.seal(facts.receipt(proof)))
        await trio.sleep(1)
        assert provider.statistics().earnings == 0
        assert provider.statistics().unpaid_proofs == 1


def receipt_of_nothing(facts, proof, request):
    """What a coordinator writes when the gateway reports that nothing came."""
    return facts.coordinator.seal(
        facts.receipt(proof.model_copy(update={"request_id": request, "usage": ZERO_USAGE}))
    )


async def test_a_job_that_is_settled_while_it_runs_is_stopped(autojump_clock, world, facts):
    """Its gateway told the coordinator that nothing came, and goes on reading."""
    async with world.market() as (coordinator, provider, gateway):
        _, proof = await gateway.wait_done(await gateway.dispatch())
        sampling = Sampling(max_tokens=2000)
        request = await gateway.dispatch(sampling=sampling, output_limit=2000)
        await gateway.until(lambda: len(gateway.ids[request]) >= 5)
        await coordinator.say(receipt_of_nothing(facts, proof, request))
        done, _ = await gateway.wait_done(request)
        assert done.finish is Finish.CANCELLED
        assert len(gateway.ids[request]) < 100
        assert provider.statistics().running == ()


async def test_a_job_that_was_settled_before_is_refused(autojump_clock, world, facts):
    async with world.market() as (coordinator, provider, gateway):
        _, proof = await gateway.wait_done(await gateway.dispatch())
        dispatch = facts.dispatch(now=gateway.clock())
        await coordinator.say(receipt_of_nothing(facts, proof, dispatch.request_id))
        await trio.sleep(0.1)
        await gateway.dispatch(dispatch)
        await gateway.until(lambda: dispatch.request_id in gateway.refused)
        assert provider.statistics().refusals[RefuseReason.REPLAYED] == 1


async def test_a_repeated_receipt_is_counted_once(autojump_clock, world, facts):
    async with world.market() as (coordinator, provider, gateway):
        request = await gateway.dispatch()
        _, proof = await gateway.wait_done(request)
        receipt = facts.receipt(proof)
        for _ in range(2):
            await coordinator.say(facts.coordinator.seal(receipt))
        await trio.sleep(1)
        assert provider.statistics().earnings == receipt.amount - receipt.fee


async def test_gateways_of_the_roster_are_dialled_and_forgotten(autojump_clock, world, facts):
    def entry(peer, address):
        return RosterEntry(peer=peer, role=Role.GATEWAY, addresses=(address,))

    async with (
        world.coordinate() as coordinator,
        world.provide(),
        world.network.join(b"g" * 32) as hidden,
    ):
        await coordinator.wait_for(Announce)
        liar = entry(facts.stranger.peer_id, f"/memory/{hidden.peer_id}/p2p/{hidden.peer_id}")
        await coordinator.say(Roster(entries=(liar, entry(facts.gateway.peer_id, "nonsense"))))
        await trio.sleep(1)
        assert hidden.peers() == frozenset()
        honest = entry(hidden.peer_id, hidden.addresses[0])
        await coordinator.say(Roster(entries=(honest,)))
        await trio.sleep(1)
        assert facts.provider.peer_id in hidden.peers()
        await hidden.disconnect(facts.provider.peer_id)
        await trio.sleep(5)
        assert facts.provider.peer_id in hidden.peers()
        await coordinator.say(Roster(entries=()))
        await trio.sleep(1)
        await hidden.disconnect(facts.provider.peer_id)
        await trio.sleep(5)
        assert facts.provider.peer_id not in hidden.peers()
        with pytest.raises(PeerUnreachable):
            await hidden.open(facts.provider.peer_id, INFERENCE)


# --- its own life ---------------------------------------------------------------------------------


async def test_stopping_cancels_jobs_and_leaves_their_proofs_on_disk(
    autojump_clock, world, facts, long, tmp_path
):
    async with world.coordinate() as coordinator:
        async with world.provide(proofs_folder=tmp_path):
            await coordinator.wait_for(Announce)
            async with world.buy() as gateway:
                request = await gateway.dispatch(sampling=long)
                await gateway.wait_tokens(request, 5)
                world.provider_scope.cancel()
                await gateway.until(lambda: gateway.failure is not None)
        ((stored, _),) = ProofSpool(tmp_path).load(facts.provider.peer_id)
        assert stored == request
        coordinator.proofs.clear()
        async with world.provide(proofs_folder=tmp_path):
            await coordinator.until(lambda: request in coordinator.proofs)


async def test_a_token_from_before_a_restart_is_not_taken(autojump_clock, world, facts):
    async with world.coordinate() as coordinator:
        async with world.provide():
            await coordinator.wait_for(Announce)
            dispatch = facts.dispatch(now=world.clock())
            async with world.buy() as gateway:
                await gateway.wait_done(await gateway.dispatch(dispatch))
        async with world.provide():
            await trio.sleep(1)
            async with world.buy() as gateway:
                await gateway.dispatch(dispatch)
                refuse = await gateway.wait_refused(dispatch.request_id)
                assert refuse.reason is RefuseReason.REPLAYED


async def test_before_the_first_welcome_no_token_is_good(autojump_clock, world):
    async with world.provide(), world.buy() as gateway:
        request = await gateway.dispatch()
        assert (await gateway.wait_refused(request)).reason is RefuseReason.REPLAYED
