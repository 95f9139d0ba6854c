"""What a developer does in her first five minutes, against real processes and the real model."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import openai
import pytest
from devnets import GATEWAY, MODEL, NODE, eventually
from openai import OpenAI

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture
def client(network):
    with OpenAI(base_url=network.base_url, api_key=network.api_key, max_retries=0) as each:
        yield each


def question(content: str = "What is the capital of France?"):
    return [{"role": "user", "content": content}]


def test_the_sdk_gets_an_answer_with_a_receipt_that_verifies(network, client) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=question(), max_tokens=20, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.completion_tokens > 0
    done = network.verify(answer.request_id)
    checks = json.loads(done.stdout)
    assert done.returncode == 0, checks
    holding = {check["check"] for check in checks if check["verdict"] == "holds"}
    assert {
        "receipt signature",
        "delivery",
        "proof",
        "bill",
        "bid set",
        "winner",
        "price",
    } <= holding


def test_the_sdk_streams_the_same_answer(client) -> None:
    options = {"model": MODEL, "messages": question(), "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.request_id == chunks[0].request_id for chunk in chunks)
    assert sum(bool(chunk.choices and chunk.choices[0].finish_reason) for chunk in chunks) == 1
    assert chunks[-1].usage.completion_tokens > 0
    assert len([chunk for chunk in chunks if chunk.choices]) > 5


def test_a_seed_repeats_itself_and_another_does_not(client) -> None:
    def story(seed: int) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=question("Tell a story."), max_tokens=24, seed=seed
        )
        return answer.choices[0].message.content

    assert story(1) == story(1)
    assert story(1) != story(2)


def test_curl_gets_an_answer_and_a_stream_that_ends(network) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"model": MODEL, "messages": question(), "max_tokens": 8, "stream": True}
    done = subprocess.run(
        [
            "curl", "-sN", "-i", f"{network.base_url}/chat/completions",
            "-H", f"Authorization: Bearer {network.api_key}",
            "-H", "Content-Type: application/json", "-d", json.dumps(body),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    head, _, events = done.stdout.partition("\n\n")
    assert "200" in head.splitlines()[0]
    assert "text/event-stream" in head
    assert events.rstrip().endswith("data: [DONE]")


def test_the_models_are_those_that_are_served(client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_model_that_nobody_serves_is_not_found(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-7", messages=question())
    assert caught.value.code == "model_not_found"


def test_a_key_that_was_never_made_opens_nothing(network) -> None:
    with (
        OpenAI(base_url=network.base_url, api_key="sk-pnv-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_a_revoked_key_stops_working(network) -> None:
    home = ["--home", str(network.home / "gateway")]
    made = subprocess.run(
        [*GATEWAY, "keys", "create", "--name", "brief", "--json", *home],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    key = json.loads(made.stdout)
    headers = {"Authorization": f"Bearer {key['key']}"}
    url = f"{network.base_url}/models"
    assert httpx.get(url, headers=headers).status_code == 200
    prefix = key["prefix"]
    subprocess.run([*GATEWAY, "keys", "revoke", prefix, *home], check=True, timeout=60)
    eventually(lambda: httpx.get(url, headers=headers).status_code == 401, within=5)


def test_a_prompt_over_the_window_is_refused_in_the_known_words(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=question("word " * 12_000), max_tokens=5
        )
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is" in str(caught.value)


def test_replay_names_the_winner(network) -> None:
    request_id = network.chat()["request_id"]
    winner = network.receipt(request_id)["receipt"]["provider"]
    done = subprocess.run(
        [
            *NODE, "replay", request_id, "--gateway", network.base_url,
            "--api-key", network.api_key, "--json",
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["awards"][0]["provider"] == winner


def test_a_receipt_with_one_byte_changed_fails(network, tmp_path) -> None:
    request_id = network.chat()["request_id"]
    saved = network.receipt(request_id)
    body = saved["envelope"]["body"]
    saved["envelope"]["body"] = body[:40] + ("A" if body[40] != "A" else "B") + body[41:]
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(saved))
    done = subprocess.run(
        [*NODE, "verify", str(path), "--json"], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1


def test_status_and_metrics_tell_what_happened(network) -> None:
    network.chat()
    done = subprocess.run(
        [*NODE, "status", "--home", str(network.home / "coordinator"), "--json"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["awards"] >= 1
    root = network.base_url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    assert "pinaivu_gateway_" in httpx.get(f"{root}/metrics").text
