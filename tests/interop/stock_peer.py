"""A stock py-libp2p peer that does what it is told: one JSON object a line in, one a line out.

Speaks TCP; WebSocket with the argument /ws.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

import trio

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_keys
    from libp2p.host.ping import PingService
    from libp2p.network.stream.exceptions import StreamEOF
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.peer.peerstore import PeerStoreError
    from libp2p.pubsub.gossipsub import GossipSub
    from libp2p.pubsub.pubsub import Pubsub
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr

ECHO = "/interop/echo/1"
TOPIC = "/pinaivu/interop/1"


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201


async def echo(stream) -> None:
    try:
        while data := await stream.read(65536):
            await stream.write(data)
    except StreamEOF:
        pass
    await stream.close()


class Peer:
    def __init__(self, host, pubsub) -> None:
        self.host, self.pubsub = host, pubsub

    async def other(self):
        while not self.host.get_connected_peers():  # noqa: ASYNC110 - libp2p's to tell
            await trio.sleep(0.01)
        return self.host.get_connected_peers()[0]

    async def dial(self, address: str):
        info = info_from_p2p_addr(Multiaddr(address))
        await self.host.connect(info)
        return {"dialled": str(info.peer_id)}

    async def echo(self, size: int):
        stream = await self.host.new_stream(await self.other(), [ECHO])
        data = bytes((at * 7 + (at >> 8)) & 0xFF for at in range(size))
        back = bytearray()

        async def read() -> None:
            while len(back) < size:
                back.extend(await stream.read(65536))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for at in range(0, size, 32768):
                await stream.write(data[at : at + 32768])
        await stream.close()
        return {"echoed": len(back), "same": back == data}

    async def ping(self):
        started = time.perf_counter()
        await PingService(self.host).ping(await self.other())
        return {"milliseconds": 1000 * (time.perf_counter() - started)}

    async def identify(self):
        store = self.host.get_peerstore()
        try:
            return {"protocols": list(store.get_protocols(await self.other()))}
        except PeerStoreError:  # of whom nothing is known yet
            return {"protocols": []}

    async def publish(self, text: str):
        await self.pubsub.publish(TOPIC, text.encode())
        return {"published": text}


async def hear(subscription) -> None:
    async for message in subscription:
        tell(heard=message.data.decode())


async def main() -> None:
    keys = create_new_key_pair(seed=os.urandom(32))
    noise = Transport(keys, noise_privkey=create_noise_keys().private_key)
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0" + "".join(sys.argv[1:]))]
    host = libp2p.new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise}, listen_addrs=listen)
    router = GossipSub(["/meshsub/1.1.0"], 6, 4, 12, heartbeat_interval=1)
    pubsub = Pubsub(host, router, strict_signing=True)
    async with (
        host.run(listen),
        background_trio_service(pubsub),
        background_trio_service(router),
        trio.open_nursery() as nursery,
    ):
        await pubsub.wait_until_ready()
        host.set_stream_handler(ECHO, echo)
        nursery.start_soon(hear, await pubsub.subscribe(TOPIC))
        peer = Peer(host, pubsub)
        tell(address=str(host.get_addrs()[0]))
        async for line in trio.wrap_file(sys.stdin):
            order = json.loads(line)
            number = order.pop("id")
            try:
                facts = await getattr(peer, order.pop("do"))(**order)
            except Exception as exc:  # noqa: BLE001 - told to the test
                facts = {"error": repr(exc)}
            tell(answer=number, **facts)
        os._exit(0)


if __name__ == "__main__":
    trio.run(main)
