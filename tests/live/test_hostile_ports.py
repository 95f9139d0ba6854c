"""Every listening port of a running network, and what strangers throw at it."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

import httpx
import psutil
import pytest
import trio
from devnets import devnet

from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.protocol.topics import INFERENCE, LOG, MARKET

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def attacks():
    path = Path(__file__).parent.parent / "mesh" / "attacks.py"
    spec = importlib.util.spec_from_file_location("attacks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    home = tmp_path_factory.mktemp("besieged")
    with devnet(home, "--providers", "1", "--engine", "bench", "--model", "bench") as running:
        yield running


def mesh_address(network, role: str, pid: int, *, except_port: int = 0) -> str:
    ports = {
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port != except_port
    }
    (port,) = ports
    peer = Signer(load_or_create_seed(network.home / role)).peer_id
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"


def http_port(network) -> int:
    return httpx.URL(network.base_url).port


@pytest.fixture(params=["coordinator", "provider-1", "gateway"])
def victim(request, network):
    """Its address and a protocol it serves; afterwards it lives, stays small, and serves others."""
    pids = network.pids
    pid = pids["providers"][0] if request.param == "provider-1" else pids[request.param]
    process = psutil.Process(pid)
    before = process.memory_info().rss
    log = network.home / f"{request.param}.log"
    complaints = log.read_text().count("dropped")
    address = mesh_address(network, request.param, pid, except_port=http_port(network))
    protocol = INFERENCE if request.param == "provider-1" else MARKET
    yield address, None if request.param == "gateway" else protocol
    assert process.is_running()
    assert process.memory_info().rss - before < 100 * MEBIBYTE
    assert log.read_text().count("dropped") - complaints <= 3
    answer = ask(network)
    assert answer.status_code == 200, answer.text


def ask(network) -> httpx.Response:
    body = {"model": "bench", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    with network.http() as client:
        return client.post("/chat/completions", json=body)


async def test_a_megabyte_of_random_bytes(victim, attacks) -> None:
    await attacks.random_megabyte(victim[0])


async def test_garbage_at_every_stage(victim, attacks) -> None:
    await attacks.garbage_at_every_stage(victim[0])


async def test_half_open_connections_keep_nobody_out(network, victim, attacks) -> None:
    async with attacks.half_open_connections(victim[0], 300):
        answer = await trio.to_thread.run_sync(ask, network)
        assert answer.status_code == 200


async def test_a_gibibyte_length_prefix(victim, attacks) -> None:
    address, protocol = victim
    if protocol is None:
        return  # a gateway serves no protocol: it opens the streams
    assert await attacks.gigabyte_length_prefix(address, protocol)
    if protocol == MARKET:
        assert await attacks.gigabyte_length_prefix(address, LOG)


async def test_five_thousand_streams(victim, attacks) -> None:
    assert await attacks.five_thousand_streams(victim[0])


async def test_the_http_port_takes_what_the_internet_brings(network) -> None:
    address = ("127.0.0.1", http_port(network))
    process = psutil.Process(network.pids["gateway"])
    before = process.memory_info().rss
    silent = [socket.create_connection(address) for _ in range(200)]
    try:
        for blob in (
            os.urandom(MEBIBYTE),
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n",
            b"\x80" * 1000,
        ):
            with socket.create_connection(address) as connection:
                connection.settimeout(2)
                try:
                    connection.sendall(blob)
                    connection.recv(4096)
                except OSError:
                    pass
        assert ask(network).status_code == 200
    finally:
        for connection in silent:
            connection.close()
    assert process.memory_info().rss - before < 100 * MEBIBYTE


async def test_a_client_that_never_reads_holds_nobody_up(network) -> None:
    body = (
        b'{"model":"bench","messages":[{"role":"user","content":"x"}],'
        b'"max_tokens":3000,"stream":true}'
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {network.api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    before = psutil.Process(network.pids["gateway"]).memory_info().rss
    deaf = []
    for _ in range(8):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", http_port(network)))
        connection.sendall(head + body)
        deaf.append(connection)
    try:
        for _ in range(5):
            answer = await trio.to_thread.run_sync(ask, network)
            assert answer.status_code == 200
    finally:
        for connection in deaf:
            connection.close()
    assert psutil.Process(network.pids["gateway"]).memory_info().rss - before < 100 * MEBIBYTE
