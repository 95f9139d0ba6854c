"""What becomes of a connection after an answer that is an error."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from counting_market import Script
from http_client import CHAT, Counter, open_counter

from pinaivu_gateway import jobs


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with open_counter(tmp_path) as opened:
        yield opened


def request(counter: Counter, *, connection: str) -> bytes:
    body = json.dumps(CHAT).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {counter.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {connection}\r\n\r\n"
    )
    return head.encode() + body


async def test_a_refused_job_closes_the_connection_if_that_was_asked_for(counter: Counter):
    counter.market.script = Script(refusal=jobs.NoBids("nobody"))
    stream = await counter.send_raw(request(counter, connection="close"))
    received = b""
    with trio.fail_after(5):
        async with stream:
            async for chunk in stream:
                received += chunk
    assert received.startswith(b"HTTP/1.1 503")


async def test_a_refused_job_leaves_its_connection_to_the_next_request(counter: Counter):
    counter.market.script = Script(refusal=jobs.NoBids("nobody"))
    stream = await counter.send_raw(request(counter, connection="keep-alive"))
    with trio.fail_after(5):
        async with stream:
            for _ in range(5):
                received = b""
                while not received.endswith(b"}}"):
                    received += await stream.receive_some()
                assert received.startswith(b"HTTP/1.1 503")
                await stream.send_all(request(counter, connection="keep-alive"))
