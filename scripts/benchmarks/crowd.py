"""Many peers that only stay connected: what each costs the process that they are connected to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import AsyncExitStack
from typing import Any

import psutil
import trio

from scripts.benchmarks.stacks import MANY

_WATCHED_SECONDS = 5.0


def idle_peers(stack: str, peers: int) -> dict[str, Any]:
    """Memory and CPU of a serving process with so many peers, each of its own identity."""
    command = [sys.executable, "-m", "scripts.benchmarks.stacks", stack]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip() if server.stdout else ""
            process = psutil.Process(server.pid)
            before = process.memory_info().rss
            crowd = [sys.executable, "-m", "scripts.benchmarks.crowd", stack, address, str(peers)]
            with subprocess.Popen(crowd, stdout=subprocess.PIPE, text=True) as others:
                try:
                    dialled = json.loads(others.stdout.readline() if others.stdout else "")
                    time.sleep(2)
                    started, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
                    time.sleep(_WATCHED_SECONDS)
                    share = (sum(process.cpu_times()[:2]) - cpu) / (time.perf_counter() - started)
                    grown = process.memory_info().rss - before
                finally:
                    others.kill()
        finally:
            server.kill()
    return {
        "peers": peers,
        "kib_per_peer": round(grown / peers / 1024, 1),
        "cpu": round(share, 4),
        "connected_in_seconds": dialled["seconds"],
    }


async def _gather(stack: str, address: str, peers: int) -> None:
    """Hosts that connect and then say nothing but what their libp2p says."""
    from pinaivu_node.mesh.config import MeshConfig
    from pinaivu_node.mesh.libp2p import host as ours
    from scripts.benchmarks import stacks

    ours.silence()
    location, _, peer = address.rpartition("/p2p/")
    started = time.perf_counter()
    async with AsyncExitStack() as stack_of_hosts, trio.open_nursery() as nursery:
        for _ in range(peers):
            if stack == "ours":
                host = ours.make_host(
                    os.urandom(32),
                    MeshConfig(listen=(), max_connections=MANY, dial_timeout=30, open_timeout=30),
                    gate=lambda _peer: True,
                    fault=lambda *_: None,
                )
                await stack_of_hosts.enter_async_context(host.run([]))
                nursery.start_soon(host.get_network().upgrader.muxer_multistream.pulse.run)
            else:
                host = await stack_of_hosts.enter_async_context(stacks.stock_host([]))
            await ours.dial(host, location, peer)
        print(json.dumps({"seconds": round(time.perf_counter() - started, 1)}), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    trio.run(_gather, sys.argv[1], sys.argv[2], int(sys.argv[3]))
