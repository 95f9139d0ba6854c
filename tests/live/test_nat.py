"""A market across NATs, firewalls and a bad link: real processes on hosts of their own.

pytest tests/live/test_nat.py -m live -s       prints the round trips too
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hosts
import pytest
from devnets import GATEWAY, NODE, eventually

from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.protocol.signing import Signer

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

MODEL = "bench:1"
ASK = """
import json, sys, urllib.request
key, text = sys.argv[1:]
body = {"model": "bench:1", "max_tokens": 40, "messages": [{"role": "user", "content": text}]}
request = urllib.request.Request("http://127.0.0.1:8080/v1/chat/completions",
    json.dumps(body).encode(),
    {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=30) as answer:
    print(answer.read().decode())
"""


class Market:
    """A coordinator, a gateway and a provider, each in a namespace."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.coordinator = home / "coordinator"
        self.peer = Signer(load_or_create_seed(self.coordinator)).peer_id
        self._processes: list[subprocess.Popen[bytes]] = []
        self._gateway = ""
        self._key = ""

    def coordinate(self, space: str, *options: str) -> None:
        self._start(
            space, "coordinator", *NODE, "coordinate", "--home", str(self.coordinator),
            "--welcome-credit", "1000000000000", *options,
        )  # fmt: skip

    def serve(self, space: str, coordinator: str, *options: str) -> None:
        home = str(self.home / "gateway")
        made = subprocess.run(
            [*GATEWAY, "keys", "create", "--home", home, "--name", "x", "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        self._gateway, self._key = space, json.loads(made.stdout)["key"]
        self._start(
            space, "gateway", *GATEWAY, "serve", "--home", home, "--listen", "127.0.0.1:8080",
            *(["--coordinator", coordinator] if coordinator else []), *options,
        )  # fmt: skip

    def sell(self, space: str, *coordinators: str, options: tuple[str, ...] = ()) -> None:
        self._start(
            space, "provider", *NODE, "start", "--home", str(self.home / "provider"),
            "--engine", "bench", "--model", MODEL,
            *(word for each in coordinators for word in ("--coordinator", each)), *options,
        )  # fmt: skip

    def chat(self, text: str = "Hello?") -> dict[str, Any]:
        done = hosts.in_host(self._gateway, sys.executable, "-c", ASK, self._key, text)
        assert done.returncode == 0, done.stderr[-300:]
        return json.loads(done.stdout)

    def ask(self, command: str, home: str) -> dict[str, Any]:
        done = subprocess.run(
            [*NODE, command, "--home", str(self.home / home), "--json"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-300:]
        return json.loads(done.stdout)

    def paths(self) -> tuple[str, str]:
        """How the provider is connected with the coordinator and with the gateway."""
        told = self.ask("doctor", "provider")
        (home,), gateways = told["coordinator"], told["gateways"]
        assert gateways
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
        return home["path"], "+".join(sorted({each["path"] for each in gateways}))

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.home.glob("*.log"))

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            assert process.wait(timeout=20) is not None

    def _start(self, space: str, name: str, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", space, *command],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip
        self._processes.append(process)


@contextmanager
def market(home: Path) -> Iterator[Market]:
    running = Market(home)
    try:
        yield running
    except BaseException:
        sys.stderr.write(running.logs())
        raise
    finally:
        running.stop()


@pytest.fixture
def net() -> Iterator[hosts.Internet]:
    if (reason := hosts.missing()) is not None:
        pytest.skip(reason)
    with hosts.internet() as made:
        yield made


def answered(running: Market, *, within: float = 40) -> None:
    eventually(lambda: running.chat()["choices"], within=within)


@pytest.mark.parametrize(
    ("provider_hidden", "gateway_hidden", "bad_link", "path"),
    [
        (True, False, False, "direct"),
        (False, True, False, "direct"),
        (True, True, False, "relayed"),
        (True, True, True, "relayed"),
    ],
    ids=["provider", "gateway", "both", "both-bad-link"],
)
def test_a_market_works_behind_nats(
    net, tmp_path, provider_hidden, gateway_hidden, bad_link, path
) -> None:
    space, address = net.public("coord")
    coordinator = f"/ip4/{address}/tcp/4001/p2p/"
    with market(tmp_path) as running:
        running.coordinate(space)
        gateway = net.hidden("gw") if gateway_hidden else net.public("gw")[0]
        running.serve(gateway, coordinator + running.peer)
        if provider_hidden:
            provider = net.hidden("prov", bad_link=bad_link)
        else:
            provider = net.public("prov")[0]
        running.sell(provider, coordinator + running.peer)
        answered(running)
        assert running.paths() == ("direct", path)
        pipes = running.ask("status", "coordinator")["mesh"]["pipes_made"]
        assert bool(pipes) == (path == "relayed")
        for _ in range(3):
            running.chat()


def test_a_provider_gets_out_through_the_https_port_alone(net, tmp_path) -> None:
    certificate = self_signed(tmp_path)
    listen = ("--listen", "/ip4/0.0.0.0/tcp/4001", "--listen", "/ip4/0.0.0.0/tcp/443/wss")
    tls = ("--tls-cert", str(certificate))
    space, address = net.public("coord")
    gateway, _ = net.public("gw")
    provider = net.hidden("prov", lets_out="tcp dport 443")
    with market(tmp_path) as running:
        coordinator = f"/ip4/{address}/tcp/4001/p2p/{running.peer}"
        by_websocket = f"/ip4/{address}/tcp/443/wss/p2p/{running.peer}"
        running.coordinate(space, *listen, *tls)
        running.serve(
            gateway, coordinator, "--mesh-listen", "/ip4/0.0.0.0/tcp/4001",
            "--mesh-listen", "/ip4/0.0.0.0/tcp/443/wss", "--mesh-tls-cert", str(certificate),
        )  # fmt: skip
        running.sell(provider, coordinator, by_websocket)
        answered(running)
        home, gateways = running.paths()
        assert home == "websocket"
        assert "websocket" in gateways


def test_a_coordinator_is_found_on_the_local_network(net, tmp_path) -> None:
    coordinator, other = net.neighbours("coord", "other")
    with market(tmp_path) as running:
        running.coordinate(coordinator, "--lan")
        running.serve(other, "", "--lan")
        running.sell(other, options=("--lan",))
        answered(running)
        assert running.paths() == ("direct", "direct")


def self_signed(folder: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    both = folder / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=example.org", "-keyout", str(both),
         "-out", str(folder / "certificate.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_text(both.read_text() + (folder / "certificate.pem").read_text())
    return both
