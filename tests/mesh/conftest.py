"""Two networks that look the same to a test: real sockets, and memory under a virtual clock."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest
import trio.testing

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.memory import MemoryNetwork
from pinaivu_node.mesh.mesh import Mesh


def seed_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Network(Protocol):
    def join(
        self, name: str, config: MeshConfig | None = None
    ) -> AbstractAsyncContextManager[Mesh]: ...


class RealNetwork:
    """Each peer listens on the loopback interface, on the port it had before if it had one."""

    def __init__(self) -> None:
        self._listen: dict[str, tuple[str, ...]] = {}

    @asynccontextmanager
    async def join(self, name: str, config: MeshConfig | None = None) -> AsyncIterator[Mesh]:
        config = (config or MeshConfig()).model_copy(
            update={"listen": self._listen.get(name, ("/ip4/127.0.0.1/tcp/0",))}
        )
        async with open_libp2p_mesh(config, seed=seed_of(name)) as mesh:
            self._listen[name] = (mesh.addresses[0].partition("/p2p/")[0],)
            yield mesh


class VirtualNetwork:
    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network

    def join(
        self, name: str, config: MeshConfig | None = None
    ) -> AbstractAsyncContextManager[Mesh]:
        return self.network.join(seed_of(name), config)


@pytest.fixture(params=["libp2p", "memory"])
def clock(request: pytest.FixtureRequest) -> trio.testing.MockClock | None:
    """Virtual for the memory network; a test of both names it, as pytest-trio wants."""
    return trio.testing.MockClock(autojump_threshold=0) if request.param == "memory" else None


@pytest.fixture
async def network(clock: trio.testing.MockClock | None) -> AsyncIterator[Network]:
    if clock is None:
        yield RealNetwork()
    else:
        async with MemoryNetwork(seed=1, latency=0.01) as memory:
            yield VirtualNetwork(memory)
