"""A whole gateway on the memory mesh, with nobody at the other end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from http_client import CHAT, new_key

from pinaivu_gateway.config import ConfigError, GatewaySettings
from pinaivu_gateway.http_server import ListenError, bind
from pinaivu_gateway.service import serve_gateway
from pinaivu_gateway.store import StoreError, open_store
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.protocol.signing import Signer

SEED = b"g" * 32
NOBODY = "/memory/1/p2p/" + Signer(b"c" * 32).peer_id


def settings(home: Path, **changes: object) -> GatewaySettings:
    fields = {"home": home, "listen": "127.0.0.1:0", "coordinator": NOBODY, **changes}
    return GatewaySettings(**fields)  # type: ignore[arg-type]


async def test_without_a_coordinator_it_serves_and_says_so(tmp_path: Path):
    stop = trio.Event()
    async with (
        MemoryNetwork() as network,
        network.join(SEED) as mesh,
        trio.open_nursery() as nursery,
    ):
        run = partial(serve_gateway, mesh, Signer(SEED), settings(tmp_path), stop=stop)
        url: str = await nursery.start(run)
        key, record = new_key()
        async with open_store(f"sqlite:///{tmp_path}/gateway.db") as store:
            await store.add_key(record)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(headers=headers) as client:
            health = await client.get(url.removesuffix("/v1") + "/health")
            models = await client.get(f"{url}/models")
            chat = await client.post(f"{url}/chat/completions", json=CHAT)
            page = await client.get(url.removesuffix("/v1") + "/metrics")
        stop.set()
    assert health.status_code == 503
    assert models.json()["data"] == []
    assert (chat.status_code, chat.json()["error"]["code"]) == (502, "coordinator_unreachable")
    assert 'pinaivu_gateway_job_errors_total{error="CoordinatorUnreachable"} 1.0' in page.text
    assert "pinaivu_mesh_connected_peers 0.0" in page.text


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"coordinator": ()}, ConfigError),
        ({"coordinator": "/ip4/1.2.3.4/tcp/1/p2p/x"}, ConfigError),
        ({"listen": "nowhere"}, ConfigError),
        ({"database": "sqlite:////no/such/folder/x.db"}, StoreError),
    ],
)
async def test_what_cannot_start_says_why(tmp_path: Path, changes, error):
    async with MemoryNetwork() as network, network.join(SEED) as mesh:
        with pytest.raises(error):
            await serve_gateway(mesh, Signer(SEED), settings(tmp_path, **changes))


async def test_a_taken_port_is_told_before_anything_else_starts(tmp_path: Path):
    with bind("127.0.0.1:0") as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with MemoryNetwork() as network, network.join(SEED) as mesh:
            with pytest.raises(ListenError):
                await serve_gateway(mesh, Signer(SEED), settings(tmp_path, listen=listen))
    assert not (tmp_path / "gateway.db").exists()
