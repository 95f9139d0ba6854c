"""Finding a coordinator on the local network."""

from __future__ import annotations

import pytest
import trio

from pinaivu_node.mesh.lan import addresses_of_untrusted, advertised, find_coordinator
from pinaivu_node.protocol.ids import PeerId

PEER = PeerId("12D3KooWRdFFg3yTbTsDq5Z1yCvCWbqznEFro9jeVivo7rkayJ4D")
OTHER = PeerId("12D3KooWEfY2TmhEWp1scTkNTgGcB6sBdaeicFJXJjeBmUpFMyg8")
TCP = f"/ip4/192.0.2.2/tcp/4001/p2p/{PEER}"
WSS = f"/ip4/192.0.2.2/tcp/443/wss/p2p/{PEER}"


async def test_what_is_advertised_is_found() -> None:
    with trio.fail_after(10):
        async with advertised(PEER, (TCP, WSS), interfaces=["127.0.0.1"]):
            assert await find_coordinator(interfaces=["127.0.0.1"]) == (TCP, WSS)


async def test_looking_can_be_given_up() -> None:
    with trio.move_on_after(0.2) as scope:
        await find_coordinator(interfaces=["127.0.0.1"])
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ({b"address0": TCP.encode(), b"address1": WSS.encode()}, (TCP, WSS)),
        ({b"address1": WSS.encode(), b"x": b"y"}, (WSS,)),
        ({b"address0": TCP.encode(), b"address1": TCP.replace(PEER, OTHER).encode()}, (TCP,)),
        ({b"address0": b"\xff", b"address1": None, b"address2": b"/p2p/x"}, ()),
        ({b"address0": f"/p2p/{OTHER}/p2p-circuit/p2p/{PEER}".encode()}, ()),
        ({b"address0": b"/" + b"x" * 200 + TCP.encode() * 10}, ()),
        ({}, ()),
    ],
    ids=["both", "some", "two-peers", "garbage", "relayed", "long", "nothing"],
)
def test_only_addresses_are_heard(said, heard) -> None:
    assert addresses_of_untrusted(said) == heard
