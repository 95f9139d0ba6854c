"""Real processes, the real model: devnets as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from real_models import MODELS

MODEL = "smollm2:135m"
NODE = [sys.executable, "-m", "pinaivu_node.cli"]
GATEWAY = [sys.executable, "-m", "pinaivu_gateway.cli"]


class Network:
    """A running devnet, and the ways to hurt it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.base_url: str = facts["base_url"]
        self.api_key: str = facts["api_key"]
        self.coordinator: str = facts["coordinator"]
        self.home = Path(facts["home"])
        self.pids: dict[str, Any] = facts["processes"]
        self.commands: dict[str, list[str]] = json.loads((self.home / "commands.json").read_text())
        self.started: list[subprocess.Popen[bytes]] = []

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=60)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def start_again(self, name: str) -> subprocess.Popen[bytes]:
        """The same process as the devnet started, under the same identity."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.commands[name], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.started.append(process)
        return process

    def nodes(self) -> list[dict[str, Any]]:
        with self.http() as client:
            return client.get("/nodes").json()["data"]

    def chat(self, content: str = "Say hello.", **options: Any) -> dict[str, Any]:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 12,
            "temperature": 0,
            **options,
        }
        with self.http() as client:
            answer = client.post("/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def receipt(self, request_id: str) -> dict[str, Any]:
        with self.http() as client:
            answer = client.get(f"/receipts/{request_id}", params={"wait": 10})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def verify(self, request_id: str) -> subprocess.CompletedProcess[str]:
        coordinator = self.coordinator.rpartition("/p2p/")[2]
        return subprocess.run(
            [
                *NODE, "verify", request_id, "--gateway", self.base_url,
                "--api-key", self.api_key, "--coordinator", coordinator, "--json",
            ],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.home.glob("*.log"))
        )


def eventually(condition: Callable[[], Any], *, within: float) -> Any:
    """Poll until it holds; the real network has no event to wait on from outside."""
    deadline = time.monotonic() + within
    while True:
        try:
            if value := condition():
                return value
        except (httpx.HTTPError, KeyError, ValueError, AssertionError) as exc:
            last: object = exc
        else:
            last = value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s; last: {last!r}")
        time.sleep(0.05)


@contextmanager
def devnet(home: Path, *options: str) -> Iterator[Network]:
    command = [
        *NODE, "devnet", "--json", "--home", str(home), "--port", "0",
        "--models-folder", str(MODELS), *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        network = None
        try:
            line = process.stdout.readline()
            assert line, "the devnet did not come up"
            network = Network(json.loads(line))
            yield network
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=40) == 0
            for started in network.started if network else ():
                started.terminate()
                started.wait(timeout=20)
