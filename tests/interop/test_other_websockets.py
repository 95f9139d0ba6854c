"""Our WebSockets beside those of other makers."""

from __future__ import annotations

import os

import pytest
import trio
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.protocol.ids import PeerId

ECHO = "/interop/echo/1"


async def echo(stream) -> None:
    try:
        while data := await stream.read(65536):
            await stream.write(data)
    except StreamEOF:
        pass
    await stream.close()


@pytest.mark.parametrize("we_dial", [True, False], ids=["we-dial", "they-dial"])
async def test_bytes_come_back_over_websockets(start_other, we_dial) -> None:
    config = MeshConfig(listen=("/ip4/127.0.0.1/tcp/0/ws",))
    async with (
        open_libp2p_mesh(config, seed=os.urandom(32)) as mesh,
        start_other("/ws") as other,
    ):
        mesh._host.set_stream_handler(ECHO, echo)
        assert "/ws/" in other.address
        peer = PeerId(other.address.rpartition("/p2p/")[2])
        with trio.fail_after(20):
            if we_dial:
                assert await mesh.dial(other.address) == peer
            else:
                assert (await other.do("dial", address=mesh.addresses[0]))["dialled"]
            answer = await other.do("echo", size=500_000)
            assert answer["same"]
            stream = await mesh._host.new_stream(ID.from_string(peer), [ECHO])
            data, back = os.urandom(200_000), b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, data)
                while len(back) < len(data):
                    back += await stream.read(65536)
            assert back == data
