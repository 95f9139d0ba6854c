"""What the mesh costs: our Noise and Yamux beside plain TCP and stock py-libp2p, on one core."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import psutil
import trio

from scripts.benchmarks.stacks import CLIENTS, Client, Pipe

PARTS: Final = (
    "round_trip",
    "one_stream",
    "many_streams",
    "bulk",
    "tokens",
    "dial",
    "slow",
    "idle",
)
STACKS: Final = ("plain", "stock", "ours")
REPEATS: Final = 3
"""Rounds of all stacks by turns; the best of each counts, since others use the machine too."""
TOKEN_BYTES: Final = 204
STREAMS: Final = 64


def measure(*, only: str | None) -> dict[str, Any]:
    """Every figure of one run, with its target."""
    figures: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; both ends on one of them",
        "python": platform.python_version(),
        "targets": [],
    }
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        for part in PARTS:
            if only in (None, part):
                print(f"bench: measuring {part} …", file=sys.stderr, flush=True)
                figures[part], rows = _MEASURES[part]()
                figures["targets"] += rows
    finally:
        os.sched_setaffinity(0, before)
    return figures


# --- parts ----------------------------------------------------------------------------------------


async def _round_trip(client: Client, _server: psutil.Process) -> float:
    """Microseconds for a kilobyte there and back, the median."""
    pipe = await _start(client, {"order": "echo"})
    frame = bytes(1024)
    times = []
    for _ in range(1500):
        started = time.perf_counter()
        await pipe.send(frame)
        await pipe.receive()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def _pour(streams: int, size: int, total: int) -> Callable[..., Awaitable[float]]:
    """Frames a second into a sink."""

    async def pour(client: Client, _server: psutil.Process) -> float:
        each = total // streams
        pipes = [await _start(client, {"order": "sink", "count": each}) for _ in range(streams)]
        frame = bytes(size)

        async def fill(pipe: Pipe) -> None:
            for _ in range(each):
                await pipe.send(frame)
            await pipe.receive()

        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for pipe in pipes:
                nursery.start_soon(fill, pipe)
        return each * streams / (time.perf_counter() - started)

    return pour


async def _tokens(client: Client, server: psutil.Process) -> tuple[float, float]:
    """CPU shares of gateway and node while 64 streams carry 50 tokens a second each."""
    count, every = 200, 0.02
    order = {"order": "source", "count": count, "size": TOKEN_BYTES, "every": every}
    async with trio.open_nursery() as nursery:
        started = trio.Event()

        async def read(pipe: Pipe) -> None:
            await started.wait()
            for _ in range(count):
                await pipe.receive()

        for _ in range(STREAMS):
            nursery.start_soon(read, await _start(client, order))
        us = psutil.Process()
        before = _cpu(us), _cpu(server), time.perf_counter()
        started.set()
    seconds = time.perf_counter() - before[2]
    return (_cpu(us) - before[0]) / seconds, (_cpu(server) - before[1]) / seconds


async def _dial(client: Client, _server: psutil.Process) -> float:
    """Milliseconds until a connection is up, secured and ready for streams, the median."""
    times = []
    for _ in range(12):
        await client.hang_up()
        await trio.sleep(0.05)
        started = time.perf_counter()
        await client.dial()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


async def _slow(client: Client, _server: psutil.Process) -> tuple[list[float], list[float]]:
    """Microseconds of round trips on 63 streams, alone and beside one that nobody reads."""
    pipes = [await _start(client, {"order": "echo"}) for _ in range(STREAMS - 1)]
    every = 0.05
    alone: list[float] = []
    beside: list[float] = []

    async def talk(times: list[float]) -> None:
        start = trio.current_time()

        async def one(pipe: Pipe, offset: float) -> None:
            for turn in range(10):
                await trio.sleep_until(start + offset + turn * every)
                started = time.perf_counter()
                await pipe.send(bytes(TOKEN_BYTES))
                await pipe.receive()
                times.append(1e6 * (time.perf_counter() - started))

        async with trio.open_nursery() as nursery:
            for number, pipe in enumerate(pipes):  # one after another, not all in one breath
                nursery.start_soon(one, pipe, number * every / len(pipes))

    for _ in range(3):  # by turns: the machine is not equally quiet all the time
        await talk(alone)
        unread: Any = await _start(client, {"order": "flood", "size": 16_384})
        await trio.sleep(0.2)
        await talk(beside)
        unread.reset()
    return alone, beside


# --- figures and targets --------------------------------------------------------------------------


def _measure_round_trip() -> tuple[dict[str, float], list[dict[str, Any]]]:
    best = {stack: min(values) for stack, values in _by_turns(_round_trip).items()}
    to_plain, to_stock = best["ours"] / best["plain"], best["ours"] / best["stock"]
    return _rounded(best), [
        _row("1 KiB there and back", f"{best['ours']:.0f} µs"),
        _row("… of plain trio", f"{to_plain:.2f} ×", "≤ 4 ×", met=to_plain <= 4),
        _row("… of stock", f"{to_stock:.2f} ×", "≤ 0.4 ×", met=to_stock <= 0.4),
    ]


def _measure_rate(
    name: str, pour: Callable[..., Awaitable[float]], least: float, *, unit: str, scale: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    best = {stack: scale * max(values) for stack, values in _by_turns(pour).items()}
    to_stock = best["ours"] / best["stock"]
    return _rounded(best), [
        _row(name, f"{best['ours']:,.0f} {unit}"),
        _row("… of plain trio", f"{best['ours'] / best['plain']:.2f} ×"),
        _row("… of stock", f"{to_stock:.1f} ×", f"≥ {least} ×", met=to_stock >= least),
    ]


def _measure_one_stream() -> tuple[dict[str, float], list[dict[str, Any]]]:
    pour = _pour(1, TOKEN_BYTES, 12_000)
    return _measure_rate("204-byte frames, 1 stream", pour, 6, unit="/s", scale=1)


def _measure_many_streams() -> tuple[dict[str, float], list[dict[str, Any]]]:
    pour = _pour(STREAMS, TOKEN_BYTES, 12_800)
    return _measure_rate("204-byte frames, 64 streams", pour, 15, unit="/s", scale=1)


def _measure_bulk() -> tuple[dict[str, float], list[dict[str, Any]]]:
    pour = _pour(1, 65_536, 1_600)
    return _measure_rate("64 KiB writes", pour, 2.5, unit="MB/s", scale=65_536 / 1e6)


def _measure_tokens() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values = _by_turns(_tokens)
    gateway = {stack: min(share for share, _ in values[stack]) for stack in STACKS}
    node = {stack: min(share for _, share in values[stack]) for stack in STACKS}
    ratio = gateway["ours"] / gateway["plain"]
    return {"gateway_cpu": _rounded(gateway), "node_cpu": _rounded(node)}, [
        _row("64 × 50 tokens/s: gateway, node CPU", f"{gateway['ours']:.1%}, {node['ours']:.1%}"),
        _row("… gateway of plain trio", f"{ratio:.2f} ×", "≤ 1.2 ×", met=ratio <= 1.2),
        _row("… gateway of stock", f"{gateway['ours'] / gateway['stock']:.2f} ×"),
    ]


def _measure_dial() -> tuple[dict[str, float], list[dict[str, Any]]]:
    best = {stack: min(values) for stack, values in _by_turns(_dial).items()}
    return _rounded(best), [
        _row("dial, secure, mux", f"{best['ours']:.1f} ms", "≤ 8 ms", met=best["ours"] <= 8),
        _row("… stock", f"{best['stock']:.0f} ms"),
    ]


def _measure_slow() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values = _by_turns(_slow, stacks=("ours",))["ours"]
    rounds = {"alone": [value[0] for value in values], "beside": [value[1] for value in values]}
    best = {
        f"{when}_{name}_us": min(map(figure, times))
        for when, times in rounds.items()
        for name, figure in (("median", statistics.median), ("p99", _p99))
    }
    ratio, late = (
        best[f"beside_{name}_us"] / best[f"alone_{name}_us"] for name in ("median", "p99")
    )
    return _rounded(best), [
        _row(
            "63 streams beside one that nobody reads", f"{ratio:.2f} ×", "≤ 1.1 ×", met=ratio <= 1.1
        ),
        _row("… the slowest hundredth of their answers", f"{late:.2f} ×"),
    ]


def _measure_idle() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from scripts.benchmarks.crowd import idle_peers

    figures = {
        "ours": idle_peers("ours", 1000),
        "stock": idle_peers("stock", 200),
    }
    ours, stock = figures["ours"], figures["stock"]
    return figures, [
        _row(
            f"{stack['peers']} idle peers, {name}",
            f"{stack['kib_per_peer']:.0f} KiB each, {stack['cpu']:.1%} of a core",
        )
        for name, stack in (("ours", ours), ("stock", stock))
    ]


# --- machinery ------------------------------------------------------------------------------------


def _by_turns(
    part: Callable[[Client, psutil.Process], Awaitable[Any]], stacks: tuple[str, ...] = STACKS
) -> dict[str, list[Any]]:
    """The part on each stack, one after another and all of them again."""
    values: dict[str, list[Any]] = {stack: [] for stack in stacks}
    for _ in range(REPEATS):
        for stack in stacks:
            with serving(stack) as (address, process):
                values[stack].append(trio.run(_connected, stack, address, process, part))
    return values


async def _connected(
    stack: str, address: str, server: psutil.Process, part: Callable[..., Awaitable[Any]]
) -> Any:
    async with _client(stack, address) as client:
        with trio.fail_after(120):
            return await part(client, server)


@asynccontextmanager
async def _client(stack: str, address: str) -> AsyncIterator[Client]:
    async with CLIENTS[stack](address) as client:
        await client.dial()
        await trio.sleep(0.3)  # identify and the like are not what is measured
        yield client
        await client.hang_up()


@contextmanager
def serving(stack: str) -> Iterator[tuple[str, psutil.Process]]:
    """A process that serves this stack, pinned as we are."""
    command = [sys.executable, "-m", "scripts.benchmarks.stacks", stack]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip() if process.stdout else ""
            if not address:
                sys.exit(f"bench: the {stack} server did not start; what it said is above")
            yield address, psutil.Process(process.pid)
        finally:
            process.kill()


async def _start(client: Client, order: dict[str, Any]) -> Pipe:
    pipe = await client.open()
    await pipe.send(json.dumps(order).encode())
    return pipe


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _row(
    figure: str, measured: str, target: str = "stated", *, met: bool | None = None
) -> dict[str, Any]:
    return {"figure": figure, "measured": measured, "target": target, "met": met}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


_MEASURES: Final = {part: globals()[f"_measure_{part}"] for part in PARTS}
