from __future__ import annotations

from market_town import PRICES, make_delivery, make_proof, make_report, make_terms

from pinaivu_node.protocol.market import Award, JobRequest
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Envelope, open_untrusted

DEARER = PriceList(input=50_000_000, cached_input=12_500_000, output=220_000_000)


async def test_the_cheaper_bidder_wins_at_the_second_price(town, autojump_clock):
    cheap = await town.provider("cheap", prices=PRICES)
    await town.provider("dear", prices=DEARER)
    gateway = await town.gateway()
    await gateway.say(JobRequest(terms=make_terms()))
    award = await gateway.heard(Award)
    assert award.auction_ms == 10  # a round trip: all have answered, nobody waits for the window
    await cheap.state(make_proof(award.tokens[0], cheap.signer))
    await gateway.state(make_delivery(gateway.peer_id, make_report(cheap.peer_id)))
    envelope = await gateway.heard(Envelope)
    receipt = open_untrusted(envelope, Receipt, signer=town.peer_id)
    assert receipt.provider == cheap.peer_id
    assert receipt.amount == 15_999  # 15,000 asked; the next would have cost 16,000
    assert receipt.fee == 319
    assert await cheap.heard(Envelope) == envelope
