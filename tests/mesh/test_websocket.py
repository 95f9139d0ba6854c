"""The WebSocket transport: what the contract suite, which runs over it too, does not ask."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import FrameStream, MeshError

ONE, OTHER = b"1" * 32, b"2" * 32
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for a name that nobody dials, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])
    start = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return file


def listening_on(suffix: str, certificate: Path | None = None) -> MeshConfig:
    return MeshConfig(listen=(f"/ip4/127.0.0.1/tcp/0{suffix}",), tls_certificate=certificate)


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send(await stream.receive())


@pytest.mark.parametrize("suffix", ["/ws", "/wss", "/tls/ws"])
@pytest.mark.parametrize("host", ["/ip4/127.0.0.1", "/dns4/localhost"])
async def test_frames_pass(suffix: str, host: str, certificate: Path) -> None:
    config = listening_on(suffix, certificate)
    async with (
        open_libp2p_mesh(config, seed=ONE) as server,
        open_libp2p_mesh(MeshConfig(listen=()), seed=OTHER) as client,
    ):
        server.handle("/echo/1", echo)
        await client.dial(server.addresses[0].replace("/ip4/127.0.0.1", host))
        stream = await client.open(server.peer_id, "/echo/1")
        for size in (0, 1, 125, 126, 65_535, 65_536, 1 << 20):
            frame = b"x" * size
            await stream.send(frame)
            assert await stream.receive() == frame


async def test_tcp_and_websocket_are_listened_on_side_by_side(certificate: Path) -> None:
    config = MeshConfig(
        listen=("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/0/ws", "/ip4/127.0.0.1/tcp/0/wss"),
        tls_certificate=certificate,
    )
    async with open_libp2p_mesh(config, seed=ONE) as server:
        assert len(server.addresses) == 3
        for address in server.addresses:
            async with open_libp2p_mesh(MeshConfig(listen=()), seed=OTHER) as client:
                assert await client.dial(address) == server.peer_id


async def test_nobody_listens_on_wss_without_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="give a certificate"):
        async with open_libp2p_mesh(listening_on("/wss"), seed=ONE):
            pass
    with pytest.raises(MeshError, match="cannot use the certificate"):
        async with open_libp2p_mesh(listening_on("/wss", tmp_path / "none.pem"), seed=ONE):
            pass


async def test_nobody_listens_on_what_we_do_not_speak() -> None:
    for suffix in ("/quic-v1", "/ws/http", "/tls"):
        with pytest.raises(MeshError, match="write it like"):
            async with open_libp2p_mesh(listening_on(suffix), seed=ONE):
                pass


async def test_a_browser_is_answered() -> None:
    async with open_libp2p_mesh(listening_on("/ws"), seed=ONE) as server:
        stream = await connect(server.addresses[0])
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
        answer = await stream.receive_some()
        assert answer.startswith(b"HTTP/1.1 400")
        assert await stream.receive_some() == b""
        await stream.aclose()


def frame(head: bytes, payload: bytes = b"") -> bytes:
    return head + b"\0\0\0\0" + payload  # the mask that changes nothing


@pytest.mark.parametrize(
    "attack",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 200_000,
        UPGRADE.replace(b"Host: x", b"Host: xn--\xe9"),
        UPGRADE + b"\xff" * 100,
        UPGRADE + b"\x82\x03abc",
        UPGRADE + frame(b"\x81\x85", b"hello"),
        UPGRADE + frame(b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"x" * 1000),
        UPGRADE + frame(b"\x82\xff\x00\x00\x7f\xff\xff\xff\xff\xff", b"x" * 1000),
        UPGRADE + frame(b"\x88\x82", b"\x03\xe8"),
        UPGRADE + frame(b"\x88\x81", b"\x03"),
        UPGRADE + frame(b"\x89\x80") * 1000,
    ],
    ids=[
        "tls", "host", "endless-head", "idna", "bad-opcodes", "unmasked", "text", "over-long",
        "endless-message", "close", "bad-close", "pings",
    ],
)  # fmt: skip
async def test_no_bytes_harm_the_listener(attack: bytes) -> None:
    async with open_libp2p_mesh(listening_on("/ws"), seed=ONE) as server:
        attacker = await connect(server.addresses[0])
        with trio.move_on_after(0.05):
            try:
                await attacker.send_all(attack)
                while await attacker.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        async with open_libp2p_mesh(MeshConfig(listen=()), seed=OTHER) as client:
            assert await client.dial(server.addresses[0]) == server.peer_id
        await attacker.aclose()


async def test_connections_that_ask_for_no_websocket_are_bounded() -> None:
    config = listening_on("/ws").model_copy(update={"max_half_open": 4})
    async with open_libp2p_mesh(config, seed=ONE) as server:
        silent = [await connect(server.addresses[0]) for _ in range(8)]
        for stream in silent[:4]:  # the oldest give way to the newest
            with trio.fail_after(2):
                assert await stream.receive_some() == b""
        async with open_libp2p_mesh(MeshConfig(listen=()), seed=OTHER) as client:
            assert await client.dial(server.addresses[0]) == server.peer_id
        for stream in silent:
            await stream.aclose()


async def run_proxy(answer: bytes, asked: list[bytes], *, task_status) -> None:
    """An HTTP proxy that answers every CONNECT like this, and then does it."""

    async def serve(client: trio.SocketStream) -> None:
        head = await client.receive_some()
        asked.append(head)
        await client.send_all(answer)
        host, _, port = head.split()[1].decode().rpartition(":")
        server = await trio.open_tcp_stream(host, int(port))
        async with server, client, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, server)
            await copy(server, client)
            nursery.cancel_scope.cancel()

    await trio.serve_tcp(serve, 0, host="127.0.0.1", task_status=task_status)


async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await source.receive_some():
            await sink.send_all(data)


OK = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"


@pytest.mark.parametrize("suffix", ["/ws", "/wss"])
async def test_a_proxy_is_got_out_through(suffix: str, certificate: Path) -> None:
    asked: list[bytes] = []
    async with (
        open_libp2p_mesh(listening_on(suffix, certificate), seed=ONE) as server,
        trio.open_nursery() as nursery,
    ):
        (listener,) = await nursery.start(run_proxy, OK, asked)
        port = listener.socket.getsockname()[1]
        config = MeshConfig(listen=(), proxy=f"http://me:se%40cret@127.0.0.1:{port}")
        async with open_libp2p_mesh(config, seed=OTHER) as client:
            assert await client.dial(server.addresses[0]) == server.peer_id
        nursery.cancel_scope.cancel()
    assert asked[0].startswith(b"CONNECT 127.0.0.1:")
    assert b"Proxy-Authorization: Basic bWU6c2VAY3JldA==\r\n" in asked[0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "refused: 407 Proxy"),
        (b"\xff\xfe\r\n\r\n", "refused"),
        (b"x" * 40_000, "not answer as a proxy"),
    ],
    ids=["407", "garbage", "endless"],
)
async def test_a_proxys_no_is_told(answer: bytes, words: str) -> None:
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(run_proxy, answer, [])
        port = listener.socket.getsockname()[1]
        config = MeshConfig(listen=(), proxy=f"http://127.0.0.1:{port}")
        async with (
            open_libp2p_mesh(listening_on("/ws"), seed=ONE) as server,
            open_libp2p_mesh(config, seed=OTHER) as client,
        ):
            with pytest.raises(MeshError, match=words):
                await client.dial(server.addresses[0])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["proxy:3128", "socks5://x:1", "http://", "http://x:99999", "[::1"])
async def test_what_is_no_proxy_is_refused(url: str) -> None:
    with pytest.raises(MeshError, match="no HTTP proxy"):
        async with open_libp2p_mesh(MeshConfig(listen=(), proxy=url), seed=ONE):
            pass


async def connect(address: str) -> trio.SocketStream:
    _, _, host, _, port, *_ = address.split("/")
    sock = trio.socket.socket(socket.AF_INET)
    await sock.connect((host, int(port)))
    return trio.SocketStream(sock)
