"""SIGKILL, SIGSTOP and return of each role; two networks side by side."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest
from devnets import MODEL, NODE, devnet, eventually

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def stream_lines(network, body):
    with network.http() as client, client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        yield from (line for line in answer.iter_lines() if line)


def long_story(**options):
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell a long story of the sea."}],
        "max_tokens": 200,
        "stream": True,
        "ignore_eos": True,
        **options,
    }


def test_a_killed_provider_is_noticed_replaced_and_welcomed_back(tmp_path) -> None:
    with devnet(tmp_path / "net") as network:
        assert len(network.nodes()) == 2
        network.kill(network.pids["providers"][0])
        eventually(lambda: len(network.nodes()) == 1, within=5)
        network.chat()
        network.start_again("provider-1")
        eventually(lambda: len(network.nodes()) == 2, within=30)  # its model loads first
        request_id = network.chat()["request_id"]
        assert network.verify(request_id).returncode == 0


def test_a_provider_that_hangs_is_taken_for_gone(tmp_path) -> None:
    with devnet(tmp_path / "net") as network:
        pid = network.pids["providers"][0]
        network.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: len(network.nodes()) == 1, within=6)
            network.chat()
        finally:
            network.kill(pid, signal.SIGCONT)
        eventually(lambda: len(network.nodes()) == 2, within=10)


def test_a_killed_coordinator_comes_back_with_its_books(tmp_path) -> None:
    with devnet(tmp_path / "net") as network:
        before = network.chat()["request_id"]
        receipt = network.receipt(before)
        seen: list[str] = []
        reader = threading.Thread(
            target=lambda: seen.extend(stream_lines(network, long_story(max_tokens=60)))
        )
        reader.start()
        eventually(lambda: seen, within=30)
        network.kill(network.pids["coordinator"])
        with network.http() as client:
            refused = eventually(
                lambda: (
                    answer
                    if (
                        answer := client.post("/chat/completions", json=long_story(stream=False))
                    ).status_code
                    != 200
                    else None
                ),
                within=10,
            )
        assert refused.status_code == 502
        assert refused.json()["error"]["code"] == "coordinator_unreachable"
        assert "retry-after" in refused.headers
        network.start_again("coordinator")
        eventually(lambda: len(network.nodes()) == 2, within=10)
        reader.join(timeout=60)
        assert seen[-1] == "data: [DONE]"  # the stream never crossed the coordinator
        request_id = json.loads(seen[0].removeprefix("data: "))["request_id"]
        assert network.verify(request_id).returncode == 0
        assert network.receipt(before)["envelope"] == receipt["envelope"]
        accounts = subprocess.run(
            [*NODE, "accounts", "--home", str(network.home / "coordinator"), "--json"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        balances = json.loads(accounts.stdout)
        assert sum(balances.values()) == 0
        assert not [name for name in balances if name.startswith("hold:")]


def test_a_killed_gateway_leaves_no_hold_and_works_again(tmp_path) -> None:
    with devnet(tmp_path / "net") as network:
        seen: list[str] = []

        def read() -> None:
            try:
                seen.extend(stream_lines(network, long_story()))
            except httpx.HTTPError as exc:
                seen.append(repr(exc))

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(2)
        network.kill(network.pids["gateway"])
        reader.join(timeout=10)
        network.start_again("gateway")
        eventually(lambda: len(network.nodes()) == 2, within=15)
        assert network.verify(network.chat()["request_id"]).returncode == 0

        def holds() -> bool:
            done = subprocess.run(
                [*NODE, "accounts", "--home", str(network.home / "coordinator"), "--json"],
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            return not [name for name in json.loads(done.stdout) if name.startswith("hold:")]

        eventually(holds, within=30)


def test_a_client_that_hangs_up_frees_the_engine_within_a_second(tmp_path) -> None:
    with devnet(tmp_path / "net", "--providers", "1") as network:
        with network.http() as client:
            body = long_story()
            with client.stream("POST", "/chat/completions", json=body) as answer:
                line = next(line for line in answer.iter_lines() if line)
        request_id = json.loads(line.removeprefix("data: "))["request_id"]
        receipt = network.receipt(request_id)["receipt"]
        assert receipt["outcome"] == "cancelled"
        assert receipt["segments"][0]["usage"]["output"] < 60
        started = time.monotonic()
        network.chat(max_tokens=1)
        assert time.monotonic() - started < 5  # it does not wait for 200 tokens of an old job


def test_two_networks_run_side_by_side_and_stop_cleanly(tmp_path) -> None:
    with devnet(tmp_path / "one", "--providers", "1") as one:
        with devnet(tmp_path / "two", "--providers", "1") as two:
            assert one.coordinator != two.coordinator
            assert one.chat()["choices"]
            assert two.chat()["choices"]
        assert one.chat()["choices"]
    port = int(one.base_url.rsplit(":", 1)[1].split("/")[0])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_restarted_devnet_keeps_key_identity_and_books(tmp_path) -> None:
    with devnet(tmp_path / "net", "--providers", "1") as first:
        request_id = first.chat()["request_id"]
        receipt = first.receipt(request_id)
    with devnet(tmp_path / "net", "--providers", "1") as second:
        assert (second.api_key, second.coordinator) == (first.api_key, first.coordinator)
        assert second.receipt(request_id)["envelope"] == receipt["envelope"]
