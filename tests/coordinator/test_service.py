"""Presence and auctions, told on the memory mesh."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
import trio
from market_town import (
    DIGEST,
    MODEL,
    PRICES,
    START,
    Peer,
    clock,
    make_bid,
    make_delivery,
    make_offer,
    make_proof,
    make_terms,
    open_town,
    request_id,
    signer_of,
)

from pinaivu_node.coordinator.config import DEFAULT_POLICY, CoordinatorConfig
from pinaivu_node.coordinator.ledger import gateway_account
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.market import (
    Acknowledge,
    Announce,
    Award,
    DispatchToken,
    Drain,
    Heartbeat,
    Hello,
    JobRefused,
    JobRequest,
    ModelLoad,
    PassReason,
    RefusalReason,
    Role,
    Welcome,
)
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.signing import Envelope, open_untrusted
from pinaivu_node.protocol.topics import MARKET
from pinaivu_node.protocol.wire import decode_untrusted, encode

DEARER = PRICES.model_copy(update={"output": 220_000_000})
LONG = {"deadline": START + 3_000_000}


async def ask(gateway: Peer, number: int = 1, **terms) -> Award | JobRefused:
    await gateway.say(JobRequest(terms=make_terms(number, **LONG | terms)))
    return await gateway.heard(Award, JobRefused)


async def refusal(gateway: Peer, number: int = 1, **terms) -> JobRefused:
    answer = await ask(gateway, number, **terms)
    assert isinstance(answer, JobRefused), answer
    return answer


# --- presence -------------------------------------------------------------------------------------


async def test_everybody_is_welcomed_with_policy_clock_and_balance(town, autojump_clock):
    mesh = await town.join("gateway")
    await town.coordinator.deposit(mesh.peer_id, 77, "one")
    stream = await town.hello(mesh, Role.GATEWAY)
    welcome = decode_untrusted(await stream.receive(), Welcome)
    assert welcome.balance == 77
    assert welcome.policy == DEFAULT_POLICY
    assert abs(welcome.now - clock()) < 100


async def test_gateways_learn_of_providers_and_providers_of_gateways(town, autojump_clock):
    gateway = await town.gateway()
    provider = await town.provider("one")
    await trio.sleep(0.2)
    [entry] = gateway.rosters[-1].entries
    assert (entry.peer, entry.addresses) == (provider.peer_id, provider.mesh.addresses)
    assert [offer.model for offer in entry.models] == [MODEL]
    [entry] = provider.rosters[-1].entries
    assert (entry.peer, entry.role) == (gateway.peer_id, Role.GATEWAY)


async def test_changes_that_come_together_are_told_together(town, autojump_clock):
    gateway = await town.gateway()
    for number in range(20):
        await town.provider(f"provider {number}")
    await trio.sleep(0.2)
    assert len(gateway.rosters[-1].entries) == 20
    assert len(gateway.rosters) < 20


async def test_a_provider_silent_for_three_heartbeats_is_gone(town, autojump_clock):
    gateway = await town.gateway()
    provider = await town.provider("one")
    await trio.sleep(0.2)
    town.network.hang(provider.peer_id)
    await trio.sleep(2)
    assert len(gateway.rosters[-1].entries) == 1
    await trio.sleep(3)
    assert gateway.rosters[-1].entries == ()
    assert (await refusal(gateway)).reason is RefusalReason.UNKNOWN_MODEL


async def test_a_provider_whose_connection_breaks_is_gone_at_once(town, autojump_clock):
    gateway = await town.gateway()
    provider = await town.provider("one")
    town.network.crash(provider.peer_id)
    await trio.sleep(0.2)
    assert gateway.rosters[-1].entries == ()


async def test_the_coordinator_beats_and_a_talking_peer_stays(town, autojump_clock):
    provider = await town.provider("one")
    await trio.sleep(10.5)
    assert [beat.sequence for beat in provider.heartbeats][-9:] == list(range(2, 11))
    assert town.coordinator.statistics().peers[Role.PROVIDER] == 1


async def test_a_peer_that_comes_back_replaces_itself(town, autojump_clock):
    provider = await town.provider("one")
    again = await town.hello(provider.mesh, Role.PROVIDER)
    decode_untrusted(await again.receive(), Welcome)
    await again.send(encode(Announce(models=(make_offer("other"),))))
    gateway = await town.gateway()
    await trio.sleep(0.2)
    [entry] = gateway.rosters[-1].entries
    assert [offer.model for offer in entry.models] == ["other"]


async def test_the_welcome_credit_is_granted_once(autojump_clock, database):
    async with open_town(database, CoordinatorConfig(welcome_credit=500)) as town:
        for _ in range(2):
            mesh = await town.join("gateway")
            welcome = decode_untrusted(
                await (await town.hello(mesh, Role.GATEWAY)).receive(), Welcome
            )
            assert welcome.balance == 500
            town.network.crash(mesh.peer_id)
            await trio.sleep(1)


async def test_a_deposit_is_made_once(town, autojump_clock):
    peer = signer_of("somebody").peer_id
    assert await town.coordinator.deposit(peer, 10, "bank transfer 1")
    assert not await town.coordinator.deposit(peer, 10, "bank transfer 1")
    assert (await town.coordinator.accounts())[gateway_account(peer)] == 10


# --- awards ---------------------------------------------------------------------------------------


async def test_the_cheaper_bidder_wins_and_the_other_stands_by(town, autojump_clock):
    cheap = await town.provider("cheap")
    dear = await town.provider("dear", prices=DEARER)
    gateway = await town.gateway()
    award = await ask(gateway)
    assert award.auction_ms == 10  # one round trip: all have answered, nobody waits
    tokens = [open_untrusted(each, DispatchToken, signer=town.peer_id) for each in award.tokens]
    assert [token.provider for token in tokens] == [cheap.peer_id, dear.peer_id]
    assert [token.rank for token in tokens] == [0, 1]
    assert [contact.addresses for contact in award.contacts] == [
        cheap.mesh.addresses, dear.mesh.addresses,
    ]  # fmt: skip
    winner = tokens[0]
    assert winner.uplift_ppm == 66_600  # 15,000 asked, and 1,000 more would have tied
    assert (winner.gateway, winner.model_digest) == (gateway.peer_id, DIGEST)
    assert winner.expires_at - winner.issued_at == DEFAULT_POLICY.token_ttl_ms
    assert (award.bids, award.passes) == (2, 0)


async def test_the_hold_is_placed_before_the_award_is_told(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway(credit=240_000)
    await ask(gateway)
    assert (await town.coordinator.accounts())[f"hold:{request_id()}"] == 240_000


async def test_who_passes_is_not_waited_for_and_counted(town, autojump_clock):
    await town.provider("one")
    full = await town.provider("full")
    full.answer = full.passing(PassReason.FULL)
    award = await ask(await town.gateway())
    assert (award.bids, award.passes, award.auction_ms) == (1, 1, 10)


async def test_who_stays_silent_holds_the_auction_up_until_its_window(town, autojump_clock):
    await town.provider("one")
    await town.provider("mute", answer=lambda offer: None)
    award = await ask(await town.gateway())
    assert award.auction_ms == DEFAULT_POLICY.window_ms


async def test_who_leaves_during_the_auction_is_not_waited_for(town, autojump_clock):
    await town.provider("one")
    mute = await town.provider("mute", answer=lambda offer: None)
    gateway = await town.gateway()
    await gateway.say(JobRequest(terms=make_terms()))
    await trio.sleep(0.05)
    town.network.crash(mute.peer_id)
    assert (await gateway.heard(Award)).auction_ms < 100


async def test_a_full_provider_is_not_waited_for(town, autojump_clock):
    await town.provider("one")
    mute = await town.provider("mute", answer=lambda offer: None)
    loads = (ModelLoad(model=MODEL, running=3, queued=1),)
    await mute.say(Heartbeat(sequence=99, loads=loads))
    assert (await ask(await town.gateway())).auction_ms == 10


async def test_a_large_market_draws_about_the_target_of_bids(town, autojump_clock):
    for number in range(60):
        await town.provider(f"provider {number}")
    gateway = await town.gateway()
    bids = [(await ask(gateway, number)).bids for number in range(1, 6)]
    assert 8 <= sum(bids) / len(bids) <= 24


async def test_the_allowed_one_is_invited_however_the_draw_falls(town, autojump_clock):
    providers = [await town.provider(f"provider {number}") for number in range(40)]
    gateway = await town.gateway()
    for number, provider in enumerate(providers[:5], start=1):
        terms = make_terms(number, **LONG)
        await gateway.say(JobRequest(terms=terms, allow=(provider.peer_id,)))
        award = await gateway.heard(Award)
        assert [contact.peer for contact in award.contacts] == [provider.peer_id]


async def test_a_place_is_given_away_once(town, autojump_clock):
    small = await town.provider("small", capacity=1)
    gateway = await town.gateway()
    award = await ask(gateway, 1)
    refused = await refusal(gateway, 2)
    assert refused.reason is RefusalReason.NOBODY_ELIGIBLE
    assert "1 full" in refused.explanation
    assert refused.retry_after_ms == 1000
    await small.state(make_proof(award.tokens[0], small.signer))
    await trio.sleep(0.1)
    assert isinstance(await ask(gateway, 3), Award)


async def test_auctions_run_side_by_side(town, autojump_clock):
    await town.provider("one", capacity=100)
    await town.provider("mute", answer=lambda offer: None, capacity=100)
    gateway = await town.gateway()
    before = trio.current_time()
    for number in range(1, 51):
        await gateway.say(JobRequest(terms=make_terms(number, **LONG)))
    for _ in range(50):
        await gateway.heard(Award)
    assert trio.current_time() - before < 1


# --- refusals -------------------------------------------------------------------------------------


async def test_each_refusal_says_which(town, autojump_clock):
    gateway = await town.gateway()
    assert (await refusal(gateway)).reason is RefusalReason.UNKNOWN_MODEL
    provider = await town.provider("one")
    cases = {
        RefusalReason.DEADLINE_PASSED: {"deadline": START},
        RefusalReason.INVALID: {"output_limit": 0, "output_estimate": 0},
        RefusalReason.NOBODY_ELIGIBLE: {"model_digest": digest_of(b"other")},
    }
    for reason, terms in cases.items():
        assert (await refusal(gateway, **terms)).reason is reason
    for wrong in (
        {"deadline": START + 10**9},
        {"input_estimate": 201},
        {"output_estimate": 101},
    ):
        assert (await refusal(gateway, **wrong)).reason is RefusalReason.INVALID
    await provider.say(Drain(draining=True))
    draining = await refusal(gateway)
    assert (draining.reason, draining.retry_after_ms) == (RefusalReason.NO_BIDS, 1000)


async def test_no_credit_names_the_balance_and_the_need(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway(credit=239_999)
    refused = await refusal(gateway)
    assert refused.reason is RefusalReason.NO_CREDIT
    assert "239999 NanoX" in refused.explanation
    assert "240000 NanoX" in refused.explanation


async def test_the_books_are_looked_into_before_the_first_offer_of_a_session_alone(
    town, autojump_clock
):
    await town.provider("one", capacity=9)
    gateway = await town.gateway()

    async def transactions(number: int) -> int:
        before = town.coordinator.statistics().store.transactions
        assert isinstance(await ask(gateway, number), Award)
        return town.coordinator.statistics().store.transactions - before

    assert [await transactions(number) for number in (1, 2, 3)] == [2, 1, 1]
    gateway.stream.reset()
    await trio.sleep(0.1)
    stream = await town.hello(gateway.mesh, Role.GATEWAY)
    gateway = Peer(gateway.mesh, gateway.signer, stream)
    await town._settle_in(gateway)
    assert [await transactions(number) for number in (4, 5)] == [2, 1]


async def test_the_broke_bother_nobody(town, autojump_clock):
    provider = await town.provider("one")
    assert (await refusal(await town.gateway(credit=0))).reason is RefusalReason.NO_CREDIT
    assert provider.offers == []


async def test_two_jobs_cannot_spend_the_same_money(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway(credit=240_000)
    for number in (1, 2):
        await gateway.say(JobRequest(terms=make_terms(number)))
    answers = [await gateway.heard(Award, JobRefused) for _ in range(2)]
    assert sorted(type(answer).__name__ for answer in answers) == ["Award", "JobRefused"]


async def test_nobody_bids_and_all_decline_are_told_apart(town, autojump_clock):
    provider = await town.provider("mute", answer=lambda offer: None)
    gateway = await town.gateway()
    silent = await refusal(gateway, 1)
    assert silent.reason is RefusalReason.NO_BIDS
    assert "in time" in silent.explanation
    provider.answer = provider.passing(PassReason.PRICE_TOO_LOW)
    declined = await refusal(gateway, 2)
    assert declined.reason is RefusalReason.NO_BIDS
    assert declined.explanation == "1 providers declined: price_too_low"
    assert declined.retry_after_ms is None


async def test_a_filter_that_nobody_passes_says_so(town, autojump_clock):
    provider = await town.provider("one")
    gateway = await town.gateway()
    for lists in ({"allow": ()}, {"deny": (provider.peer_id,)}):
        await gateway.say(JobRequest(terms=make_terms(), **lists))
        refused = await gateway.heard(JobRefused)
        assert refused.reason is RefusalReason.NOBODY_ELIGIBLE
        assert "allow and deny" in refused.explanation
    low = PriceList(input=1, cached_input=1, output=1)
    refused = await refusal(gateway, 2, max_prices=low)
    assert refused.reason is RefusalReason.NOBODY_ELIGIBLE
    assert "1 above_ceiling" in refused.explanation


async def test_a_request_id_is_good_for_one_job(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway()
    await ask(gateway)
    assert (await refusal(gateway)).reason is RefusalReason.DUPLICATE


async def test_too_many_at_once_are_asked_to_come_back(autojump_clock, database):
    async with open_town(database, CoordinatorConfig(max_auctions=1)) as town:
        await town.provider("mute", answer=lambda offer: None)
        gateway = await town.gateway()
        await gateway.say(JobRequest(terms=make_terms(1)))
        await gateway.say(JobRequest(terms=make_terms(2)))
        refused = await gateway.heard(JobRefused)
        assert (refused.reason, refused.retry_after_ms) == (RefusalReason.OVERLOADED, 1000)


async def test_a_gateway_has_so_many_jobs_open_and_no_more(autojump_clock, database):
    async with open_town(database, CoordinatorConfig(max_open_jobs=2)) as town:
        await town.provider("one")
        gateway = await town.gateway()
        assert isinstance(await ask(gateway, 1), Award)
        assert isinstance(await ask(gateway, 2), Award)
        assert (await refusal(gateway, 3)).reason is RefusalReason.OVERLOADED
        assert isinstance(await ask(await town.gateway("other"), 4), Award)


async def test_a_failing_database_refuses_and_the_coordinator_lives(town, autojump_clock):
    await town.provider("one")
    gateway = await town.gateway()

    async def rename(old: str, new: str) -> None:
        text = sa.text(f"ALTER TABLE {old} RENAME TO {new}")
        await town.store._transact(lambda connection: connection.execute(text))

    for table in ("jobs", "bid_sets"):
        await rename(table, "gone")
        assert (await refusal(gateway)).reason is RefusalReason.OVERLOADED
        await rename("gone", table)
    assert isinstance(await ask(gateway), Award)


async def test_a_gateway_that_leaves_during_its_auction_pays_nothing(town, autojump_clock):
    await town.provider("mute", answer=lambda offer: None)
    await town.provider("one")
    gateway = await town.gateway(credit=240_000)
    await gateway.say(JobRequest(terms=make_terms()))
    await trio.sleep(0.1)
    town.network.crash(gateway.peer_id)
    await trio.sleep(1)
    accounts = await town.coordinator.accounts()
    assert accounts[gateway_account(gateway.peer_id)] == 240_000


# --- peers that break the rules -------------------------------------------------------------------


async def is_dropped(peer: Peer) -> bool:
    await trio.sleep(0.5)
    with trio.move_on_after(1):
        try:
            await peer.say(Heartbeat(sequence=1))
            await trio.sleep(0.1)
            await peer.say(Heartbeat(sequence=2))
        except Exception:  # noqa: BLE001 - whatever its mesh says of a lost stream
            return True
    return False


def forged_bid(peer: Peer) -> Envelope:
    envelope = peer.signer.seal(make_bid(peer.signer))
    return envelope.model_copy(update={"signature": bytes(64)})


NO_JOB = Acknowledge(request_id=request_id(), explanation="")
MISDEEDS = {
    "a gateway bids": (Role.GATEWAY, lambda peer: peer.signer.seal(make_bid(peer.signer))),
    "a gateway announces": (Role.GATEWAY, lambda peer: Announce(models=())),
    "a gateway drains": (Role.GATEWAY, lambda peer: Drain(draining=True)),
    "a second hello": (Role.GATEWAY, lambda peer: Hello(role="gateway", addresses=(), software="")),
    "a kind that is not for us": (Role.GATEWAY, lambda peer: peer.signer.seal(NO_JOB)),
    "a provider asks for a job": (Role.PROVIDER, lambda peer: JobRequest(terms=make_terms())),
    "a provider delivers": (
        Role.PROVIDER, lambda peer: peer.signer.seal(make_delivery(peer.peer_id)),
    ),
    "a forged bid": (Role.PROVIDER, forged_bid),
    "another's signature": (
        Role.PROVIDER, lambda peer: signer_of("one").seal(make_bid(peer.signer)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("role", "misdeed"), MISDEEDS.values(), ids=MISDEEDS)
async def test_whoever_breaks_the_protocol_is_dropped_and_the_others_are_served(
    town, autojump_clock, role, misdeed
):
    await town.provider("one")
    honest = await town.gateway()
    bad = await (town.gateway if role is Role.GATEWAY else town.provider)("bad")
    await bad.say(misdeed(bad))
    assert await is_dropped(bad)
    assert isinstance(await ask(honest), Award)


async def test_bytes_that_mean_nothing_drop_their_sender(town, autojump_clock):
    for noise in (b"", b"\xff" * 1000, b"\xc1", bytes(1 << 20)):
        bad = await town.gateway(f"bad {len(noise)}")
        await bad.stream.send(noise)
        assert await is_dropped(bad)


async def test_a_bid_that_speaks_for_another_bans_its_sender(town, autojump_clock):
    honest = await town.provider("honest")
    liar = await town.provider("liar")
    liar.answer = honest.usual
    award = await ask(await town.gateway())
    assert [contact.peer for contact in award.contacts] == [honest.peer_id]
    assert await is_dropped(liar)
    assert liar.peer_id not in town.mesh.peers()


async def test_late_repeated_and_unknown_answers_are_ignored(town, autojump_clock):
    provider = await town.provider("one")
    gateway = await town.gateway()
    await ask(gateway)
    offer = provider.offers[0]
    await provider.state(provider.usual(offer))
    await provider.state(provider.usual(offer, warm_tokens=5))
    await trio.sleep(1)
    assert town.coordinator.statistics().messages_ignored == 2
    assert not await is_dropped(provider)


async def test_a_bid_of_who_does_not_sell_the_model_is_ignored(town, autojump_clock):
    mute = await town.provider("mute", answer=lambda offer: None)
    other = await town.provider("other", model="other")
    gateway = await town.gateway()
    await gateway.say(JobRequest(terms=make_terms()))
    await trio.sleep(0.1)
    await other.state(mute.usual(mute.offers[0]).model_copy(update={"bidder": other.peer_id}))
    assert (await gateway.heard(JobRefused)).reason is RefusalReason.NO_BIDS


async def test_a_bid_with_other_weights_than_announced_is_ignored(town, autojump_clock):
    """It would begin with a clean record whenever it likes."""
    shifty = await town.provider("shifty", answer=lambda offer: None)
    gateway = await town.gateway()
    await gateway.say(JobRequest(terms=make_terms()))
    await trio.sleep(0.1)
    await shifty.state(
        shifty.usual(shifty.offers[0]).model_copy(update={"model_digest": digest_of(b"others")})
    )
    assert (await gateway.heard(JobRefused)).reason is RefusalReason.NO_BIDS
    assert town.coordinator.statistics().messages_ignored == 1


async def test_one_that_comes_after_the_opening_is_held_to_its_announcement_too(
    town, autojump_clock
):
    mute = await town.provider("mute", answer=lambda offer: None)
    gateway = await town.gateway()
    await gateway.say(JobRequest(terms=make_terms()))
    await trio.sleep(0.1)
    late = await town.provider("late")
    bid = late.usual(mute.offers[0])
    await late.state(bid.model_copy(update={"model_digest": digest_of(b"others")}))
    await late.state(bid)
    assert (await gateway.heard(Award)).contacts[0].peer == late.peer_id
    assert town.coordinator.statistics().messages_ignored == 1


@pytest.mark.parametrize("first", [None, b"", b"\x00" * 100, encode(Heartbeat(sequence=1))])
async def test_a_stream_without_a_hello_is_closed(town, autojump_clock, first):
    mesh = await town.join("somebody")
    stream = await mesh.open(town.peer_id, MARKET)
    if first is not None:
        await stream.send(first)
    with trio.fail_after(11), pytest.raises(Exception, match=r".*"):
        await stream.receive()


async def test_a_banned_peer_is_out_and_stays_out_after_a_restart(autojump_clock, database):
    async with open_town(database) as town:
        provider = await town.provider("one")
        await town.coordinator.ban(provider.peer_id, 60_000, "cheated")
        assert await is_dropped(provider)
        assert provider.peer_id not in town.mesh.peers()
        with pytest.raises(Exception, match=r".*"):
            await provider.mesh.dial(town.mesh.addresses[0])
