"""One peer as a process of its own: serves an echo, keeps whom it is told to, says what it sees.

Run as `python peer.py NAME LISTEN [KEEP...]`; writes one JSON object a line, the first with its
address.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys

import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import FrameStream, Mesh, PeerConnected, StreamEnded

ECHO = "/pinaivu/echo/1"
TOPIC = "/pinaivu/test/1"


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201


async def echo(stream: FrameStream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except StreamEnded:
        await stream.end()


async def tell_peers(mesh: Mesh) -> None:
    async with mesh.watch_peers() as events:
        async for event in events:
            tell(peer=event.peer, connected=isinstance(event, PeerConnected))


async def tell_gossip(mesh: Mesh) -> None:
    async with mesh.subscribe(TOPIC) as inbox:
        async for delivery in inbox:
            tell(heard=delivery.payload.decode(), publisher=delivery.publisher)


async def main(name: str, listen: str, *keep: str) -> None:
    config = MeshConfig(listen=(listen,), hub=True, stall_limit=3.0)
    async with open_libp2p_mesh(config, seed=hashlib.sha256(name.encode()).digest()) as mesh:
        mesh.handle(ECHO, echo)
        tell(address=mesh.addresses[0], peer_id=mesh.peer_id)
        for address in keep:
            mesh.keep(address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_peers, mesh)
            nursery.start_soon(tell_gossip, mesh)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    trio.run(main, *sys.argv[1:])
