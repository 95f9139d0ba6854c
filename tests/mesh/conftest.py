"""Networks that look the same to a test: real sockets, and memory under a virtual clock."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import psutil
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

    def __init__(self, transport: str) -> None:
        self._first = f"/ip4/127.0.0.1/tcp/0{transport}"
        self._listen: dict[str, tuple[str, ...]] = {}

    @asynccontextmanager
    async def join(self, name: str, config: MeshConfig | None = None) -> AsyncIterator[Mesh]:
        config = (config or MeshConfig()).model_copy(
            update={"listen": self._listen.get(name, (self._first,))}
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


@pytest.fixture(params=["libp2p", "websocket", "memory"])
def clock(request: pytest.FixtureRequest) -> trio.testing.MockClock | None:
    """Virtual for the memory network; a test of both names it, as pytest-trio wants."""
    return trio.testing.MockClock(autojump_threshold=0) if request.param == "memory" else None


@pytest.fixture
async def network(
    clock: trio.testing.MockClock | None, request: pytest.FixtureRequest
) -> AsyncIterator[Network]:
    if clock is None:
        yield RealNetwork("/ws" if request.node.callspec.params["clock"] == "websocket" else "")
    else:
        async with MemoryNetwork(seed=1, latency=0.01) as memory:
            yield VirtualNetwork(memory)


@pytest.fixture(scope="session")
def attacks() -> ModuleType:
    """The module of attacks; import-mode=importlib keeps test folders off the path."""
    path = Path(__file__).with_name("attacks.py")
    spec = importlib.util.spec_from_file_location("attacks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PeerProcess:
    """A peer in a process of its own, which can be killed and stopped like one."""

    def __init__(self, name: str, log: Path, *keep: str, listen: str | None = None) -> None:
        self._log = log
        script = Path(__file__).with_name("peer.py")
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(script), name, listen or "/ip4/127.0.0.1/tcp/0", *keep],
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        first = self.told()
        self.address, self.peer_id = first["address"], first["peer_id"]
        self.listen = self.address.partition("/p2p/")[0]

    def told(self) -> dict[str, Any]:
        """What it says next; blocks."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log
        return json.loads(line)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def start_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., PeerProcess]]:
    started: list[PeerProcess] = []
    folder = tmp_path_factory.mktemp("peers")

    def start(name: str, *keep: str, listen: str | None = None) -> PeerProcess:
        peer = PeerProcess(name, folder / f"{len(started)}.log", *keep, listen=listen)
        started.append(peer)
        return peer

    yield start
    for peer in started:
        if peer.is_alive:
            peer.kill()
