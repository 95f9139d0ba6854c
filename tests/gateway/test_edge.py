"""What every route has in common: keys, ids, one error format, bounds, other origins."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from counting_market import MODEL, Script
from http_client import CHAT, Counter, open_counter

from pinaivu_gateway.jobs import CoordinatorUnreachable


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/no-such", 404),
        ("GET", "/v1/models/org%2Fname", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/nodes", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
    ],
)
async def test_every_error_is_openais_envelope(counter: Counter, method, path, status):
    async with counter.client() as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert ("allow" in answer.headers) == (status == 405)


async def test_an_unknown_model_is_named_in_the_words_routers_know(counter: Counter):
    for name in ("no-such:1b", "Not A Model", "x" * 500, "gpt-4o\x00", "\ud83d"):
        body = json.dumps({**CHAT, "model": name})
        async with counter.client() as client:
            if name == "no-such:1b":
                path = await client.get(f"/v1/models/{name}")
                assert path.json()["error"]["code"] == "model_not_found"
                continue
            answer = await client.post(
                "/v1/chat/completions",
                content=body,
                headers={"content-type": "application/json"},
            )
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "does not exist or you do not have access to it" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Basic abc", None),
        ("Bearer " + "k" * 300, None),
        ("Bearer sk-pnv-wrong", "invalid_api_key"),
        ("bearer EMPTY", "invalid_api_key"),
    ],
)
async def test_without_a_good_key_nothing_under_v1_is_served(counter: Counter, header, code):
    async with counter.client() as client:
        del client.headers["authorization"]
        headers = {} if header is None else {"authorization": header}
        for path in ("/v1/models", "/v1/nothing", "/v1/receipts/x"):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == code
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_scheme_may_be_written_in_any_case(counter: Counter):
    async with counter.client() as client:
        answer = await client.get("/v1/models", headers={"authorization": f"bEARER  {counter.key}"})
    assert answer.status_code == 200


async def test_a_wrong_key_is_refused_before_the_body_is_sent(counter: Counter):
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer no\r\n"
        b"content-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
    )
    async with await counter.send_raw(head) as stream:
        with trio.fail_after(1):
            answer = await stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 401")


async def test_health_and_metrics_need_no_key(counter: Counter):
    await counter.chat()
    async with counter.client() as client:
        del client.headers["authorization"]
        health = await client.get("/health")
        page = (await client.get("/metrics")).text
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert 'pinaivu_gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0' in page
    assert 'pinaivu_gateway_tokens_total{kind="completion"} 4.0' in page
    assert "pinaivu_gateway_first_token_seconds_count 1.0" in page
    assert "pinaivu_market_coordinator_connected 1.0" in page


async def test_health_fails_while_the_coordinator_is_away(counter: Counter):
    counter.market.unreachable = CoordinatorUnreachable("away")
    async with counter.client() as client:
        answer = await client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["coordinator_connected"] is False


async def test_head_is_answered_without_a_body(counter: Counter):
    async with counter.client() as client:
        answer = await client.head("/v1/models")
    assert answer.status_code == 200
    assert answer.content == b""


async def test_a_browser_may_ask_from_anywhere(counter: Counter):
    origin = {"origin": "https://example.org"}
    async with counter.client() as client:
        asked = await client.options(
            "/v1/chat/completions",
            headers={
                **origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, content-type, x-stainless-os",
            },
        )
        answer = await client.get("/v1/models", headers=origin)
        fault = await client.get("/v1/nothing", headers=origin)
        stream = await client.post(
            "/v1/chat/completions", json={**CHAT, "stream": True}, headers=origin
        )
    assert asked.status_code == 200
    for each in (asked, answer, fault, stream):
        assert each.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in each.headers
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 20])
async def test_an_oversize_body_is_refused_and_the_connection_closed(
    counter: Counter, declared, size
):
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 1 << 16):
            yield b" " * min(1 << 16, size - start)

    async with counter.client() as client:
        answer = await client.post(
            "/v1/chat/completions",
            content=b" " * size if declared else chunks(),
            headers={"content-type": "application/json"},
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert answer.headers["connection"] == "close"


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path):
    async with open_counter(tmp_path, body_timeout=0.1) as counter:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {counter.key}"
            "\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{"
        )
        async with await counter.send_raw(head.encode()) as stream:
            with trio.fail_after(2):
                answer = await stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-encoding": "gzip"}, gzip.compress(b"{}", mtime=0), 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"{}", 415),
        ({"content-type": "multipart/form-data; boundary=x"}, b"{}", 415),
        ({"content-type": "application/json; charset=utf-16"}, b"{}", 400),
        ({}, b"", 400),
        ({}, b"not json", 400),
        ({}, b"\xff\xfe{", 400),
        ({}, b"[]", 400),
        ({}, b"[" * 100_000, 400),
        ({}, b'{"seed":' + b"9" * 5000 + b"}", 400),
        ({}, b'{"temperature":NaN}', 400),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(counter: Counter, headers, content, status):
    async with counter.client() as client:
        answer = await client.post(
            "/v1/chat/completions",
            content=content,
            headers={"content-type": "application/json", **headers},
        )
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_bug_is_a_500_that_tells_nothing(counter: Counter, caplog):
    async def broken(request_id: object, *, wait_ms: int) -> None:
        raise ZeroDivisionError("secret detail")

    counter.market.receipt = broken  # type: ignore[method-assign,assignment]
    async with counter.client() as client:
        answer = await client.get("/v1/receipts/req_" + "0" * 32)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_web_socket_is_refused(counter: Counter):
    head = (
        "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with await counter.send_raw(head.encode()) as stream:
        with trio.fail_after(2):
            answer = await stream.receive_some(65536)
    assert answer.startswith(b"HTTP/1.1 403")


async def test_more_connections_than_allowed_wait_their_turn(tmp_path: Path):
    async with open_counter(tmp_path, max_connections=1) as counter:
        counter.market.script = Script(pause=0.1)
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await counter.chat(model=MODEL)).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
    assert statuses == [200, 200]
