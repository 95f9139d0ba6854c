"""How much one process streams, to clients in another."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import trio
from counting_market import Script
from http_client import CHAT, open_counter

pytestmark = pytest.mark.live

STREAMS, EVENTS = 64, 300
TOKENS_PER_SECOND = 5000
READER = """
import asyncio, sys
port, key, streams, body = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
head = f"POST /v1/chat/completions HTTP/1.1\\r\\nhost: x\\r\\nauthorization: Bearer {key}\\r\\n"
head += f"content-type: application/json\\r\\ncontent-length: {len(body)}\\r\\n\\r\\n"
async def read():
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write((head + body).encode())
    data = await reader.readuntil(b"[DONE]")
    writer.close()
    return data.count(b"data: ")
async def main():
    print(sum(await asyncio.gather(*[read() for _ in range(streams)])))
asyncio.run(main())
"""


async def test_sixty_four_streams_of_single_tokens_flow(tmp_path: Path, record_property):
    body = f'{{"stream": true, "model": "{CHAT["model"]}", "messages": [{{"role": "user", '
    body += '"content": "x"}]}'
    async with open_counter(tmp_path) as counter:
        counter.market.script = Script(texts=(" token",) * EVENTS)
        command = [sys.executable, "-c", READER, counter.port, counter.key, STREAMS, body]
        started, cpu = time.perf_counter(), time.process_time()
        done = await trio.run_process([str(word) for word in command], capture_stdout=True)
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
    record_property("microseconds_of_cpu_per_event", round(1e6 * cpu / (STREAMS * EVENTS), 1))
    assert int(done.stdout) == STREAMS * (EVENTS + 3)
    assert STREAMS * EVENTS / took > TOKENS_PER_SECOND
