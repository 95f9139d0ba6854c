"""What the network adds to its engine: time to first token, auction, relay, start-up."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from scripts.benchmarks import auctions, http_streams

PARTS: Final = ("overhead", "auction", "relay")
MODEL: Final = "smollm2:135m"
PROMPT: Final = "Name three colours of the rainbow."
ROUNDS: Final = 200
ENGINE_THREADS: Final = max(1, (os.cpu_count() or 1) // 2)
"""As the devnet gives each of its two providers."""
STREAMS: Final = 64
TOKENS_PER_STREAM: Final = 1500


def measure(*, only: str | None) -> dict[str, Any]:
    """Every figure of one run, with its target."""
    figures: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "targets": [],
    }
    for part in PARTS:
        if only in (None, part):
            _note(f"measuring {part} …")
            figures[part], rows = _MEASURES[part]()
            figures["targets"] += rows
    return figures


# --- time to first token --------------------------------------------------------------------------


def _overhead() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same engine, the same prompt: through the network and called directly, by turns."""
    with _devnet("--providers", "2", "--model", MODEL) as (devnet, seconds_to_ready):
        through, direct = trio.run(_race, devnet)
    added = [1000 * (a - b) for a, b in zip(through, direct, strict=True)]
    base = statistics.median(direct)
    # Per-pair differences keep the drift of a shared machine out; p99 of the network's own times
    # over the engine's median is the harsher reading, so that is the one with a target.
    overhead = sorted(1000 * (value - base) for value in through)
    result = {
        "rounds": len(through),
        "direct_ttft_ms_p50": round(1000 * base, 2),
        "direct_ttft_ms_p99": round(1000 * _quantile(direct, 0.99), 2),
        "network_ttft_ms_p50": round(1000 * statistics.median(through), 2),
        "overhead_ms_p50": round(statistics.median(overhead), 2),
        "overhead_ms_p99": round(_quantile(overhead, 0.99), 2),
        "paired_overhead_ms_p50": round(statistics.median(added), 2),
        "ready_seconds": round(seconds_to_ready, 2),
    }
    return result, [
        _target("added to TTFT, p50", result["overhead_ms_p50"], 10, "ms"),
        _target("added to TTFT, p99", result["overhead_ms_p99"], 40, "ms"),
        _target("devnet ready", result["ready_seconds"], 15, "s"),
    ]


async def _race(devnet: dict[str, Any]) -> tuple[list[float], list[float]]:
    from scripts.benchmarks.direct_engine import open_direct_engine

    port = httpx.URL(devnet["base_url"]).port or 80
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
    }
    through: list[float] = []
    direct: list[float] = []
    async with (
        open_direct_engine(MODEL, threads=ENGINE_THREADS) as time_to_first_token,
        http_streams.connect(port, api_key=devnet["api_key"]) as connection,
    ):
        for number in range(ROUNDS + 5):
            ours, _ = await connection.ask(body)
            await trio.sleep(0.02)  # settlement of the last job is not part of the next
            engine = await time_to_first_token(PROMPT)
            await trio.sleep(0.02)
            if number >= 5:  # warm-up
                through.append(ours)
                direct.append(engine)
    return through, direct


# --- relay ----------------------------------------------------------------------------------------


def _relay() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """64 streams through one gateway process, against the plainest server that could send them."""
    with _devnet("--providers", "1", "--engine", "bench", "--model", "bench") as (devnet, _):
        port = httpx.URL(devnet["base_url"]).port or 80
        ours = trio.run(_streams, port, devnet["api_key"], "bench")
        gateway_cpu = _cpu_seconds(devnet["processes"]["gateway"])
    with _plain_server() as port:
        plain = trio.run(_streams, port, "none", "bench")
    ratio = ours.tokens_per_second / plain.tokens_per_second
    result = {
        "streams": ours.streams,
        "tokens": ours.tokens,
        "tokens_per_second": round(ours.tokens_per_second),
        "sse_events_per_second": round(ours.events / ours.seconds),
        "gateway_cpu_us_per_token": round(1e6 * gateway_cpu / ours.tokens, 1),
        "plain_tokens_per_second": round(plain.tokens_per_second),
        "ratio_to_plain": round(ratio, 3),
    }
    return result, [
        _target(
            "relayed by one gateway", result["tokens_per_second"], 15000, "tokens/s", at_least=True
        ),
        {
            "figure": "of a plain trio HTTP server",
            "measured": f"{ratio:.0%}",
            "target": "stated",
            "met": None,
        },
    ]


async def _streams(port: int, api_key: str, model: str) -> http_streams.Relayed:
    await http_streams.relay(port, api_key=api_key, streams=4, tokens=50, model=model)
    return await http_streams.relay(
        port, api_key=api_key, streams=STREAMS, tokens=TOKENS_PER_STREAM, model=model
    )


@contextlib.contextmanager
def _plain_server() -> Iterator[int]:
    port = auctions.free_port()
    command = [
        sys.executable,
        "-m",
        "scripts.benchmarks.http_streams",
        str(TOKENS_PER_STREAM),
        str(port),
    ]
    with subprocess.Popen(command) as process:
        try:
            _wait_until_listening(port)
            yield port
        finally:
            process.terminate()


def _wait_until_listening(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    sys.exit("bench: the plain server did not start")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- shared ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _devnet(*options: str) -> Iterator[tuple[dict[str, Any], float]]:
    """A devnet in a temporary home, and how long it took to be ready."""
    with tempfile.TemporaryDirectory(prefix="pnv-") as home:
        command = [
            sys.executable, "-m", "pinaivu_node.cli", "devnet", "--json", "--port", "0",
            "--home", home, *options,
        ]  # fmt: skip
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = process.stdout.readline() if process.stdout else ""
                if not line:
                    sys.exit("bench: the devnet did not come up; what it said is above")
                yield json.loads(line), time.perf_counter() - started
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=30)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _target(
    figure: str, measured: float, bound: float, unit: str, *, at_least: bool = False
) -> dict[str, Any]:
    met = measured >= bound if at_least else measured <= bound
    sign = "≥" if at_least else "≤"
    return {
        "figure": figure,
        "measured": f"{measured:,} {unit}",
        "target": f"{sign} {bound:,} {unit}",
        "met": met,
    }


def _auction() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """On the memory mesh: what one auction costs, and how many messages it takes."""
    sizes = {str(providers): auctions.run(providers=providers) for providers in (10, 100, 1000)}
    return sizes, [
        _target("CPU per auction, 100 providers", sizes["100"]["cpu_ms"], 10, "ms"),
        *(
            {
                "figure": f"bids, messages per auction, {providers} providers",
                "measured": f"{size['bids']}, {size['messages']}",
                "target": "stated",
                "met": None,
            }
            for providers, size in sizes.items()
        ),
    ]


def _note(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


_MEASURES: Final = {"overhead": _overhead, "auction": _auction, "relay": _relay}
