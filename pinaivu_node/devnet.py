"""A whole network on this machine: coordinator, providers and gateway, each its own process.

Every command line is complete in itself, so that a process that was killed can be started again
by hand with what `commands.json` in the home folder says.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import httpx
import trio

from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.protocol.signing import Signer

READY_SECONDS: Final = 120
"""A cold disk and a busy machine; a warm one takes a twelfth of it."""
STOP_SECONDS: Final = 10
WELCOME_CREDIT: Final = 1_000_000_000_000
"""1,000 X: play money, granted by this network's own coordinator."""


class DevnetError(Exception):
    """The network did not come up; the message names the process and its log."""


@dataclass(frozen=True, slots=True)
class DevnetPlan:
    """What to start."""

    home: Path
    models_folder: Path
    models: tuple[str, ...] = ("smollm2:135m",)
    providers: int = 2
    port: int = 8080
    engine: str = "torch"
    engine_url: str | None = None
    threads: int | None = None
    """CPU threads of each provider's engine; None: the machine's, shared out among them."""


@dataclass(frozen=True, slots=True)
class Devnet:
    """A network that answers."""

    base_url: str
    api_key: str
    coordinator: str
    """Its multiaddr."""
    processes: Mapping[str, Any]
    home: Path
    commands: Mapping[str, list[str]]
    """By process name; each starts that process again."""

    def as_json(self) -> dict[str, Any]:
        """What `devnet --json` prints."""
        return {
            "base_url": self.base_url,
            "api_key": self.api_key,
            "coordinator": self.coordinator,
            "processes": self.processes,
            "home": str(self.home),
        }


class _Child:
    """One process and where it logs."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.command = command
        self.log = log
        with log.open("ab") as output:
            self._process = _spawn(command, output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        return self._process.poll()

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1][-300:] if lines else "(it said nothing)"
        return "(no log)"

    async def stop(self) -> None:
        """SIGTERM, then, if it does not leave in time, SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _spawn(command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # Its own process group: Ctrl-C in the terminal reaches the devnet alone, which then stops its
    # children in their order instead of racing the terminal to it.
    return subprocess.Popen(  # noqa: S603 - our own interpreter and modules
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
    )


@contextlib.asynccontextmanager
async def open_devnet(plan: DevnetPlan) -> AsyncIterator[Devnet]:
    """Start everything, wait until it answers, stop it all on leaving.  Raises DevnetError."""
    plan.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    children: list[_Child] = []

    def start(name: str) -> None:
        children.append(_Child(name, commands[name], plan.home / f"{name}.log"))

    try:
        address = _coordinator_address(plan.home / "coordinator")
        port = plan.port or _free_port()
        commands = _commands(plan, address, port)
        (plan.home / "commands.json").write_text(json.dumps(commands, indent=2))
        for name in [each for each in commands if each != "gateway"]:
            start(name)
        # Made before the gateway starts, so that two processes never migrate one database at once.
        api_key = await _api_key(plan.home)
        start("gateway")
        network = Devnet(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=api_key,
            coordinator=address,
            processes=_pids(children),
            home=plan.home,
            commands=commands,
        )
        await _wait_until_ready(plan, network, children)
        yield network
    finally:
        with trio.CancelScope(shield=True):
            for child in reversed(children):  # the gateway first: it stops taking requests
                await child.stop()


async def watch(network: Devnet, *, every: float = 0.5) -> AsyncIterator[tuple[str, int]]:
    """Yield the name and pid of each process that ends while the network runs."""
    alive = {str(name): pid for name, pid in _named_pids(network).items()}
    while alive:
        await trio.sleep(every)
        for name, pid in list(alive.items()):
            if not _is_alive(pid):
                del alive[name]
                yield name, pid


def _named_pids(network: Devnet) -> dict[str, int]:
    processes = network.processes
    named = {"coordinator": processes["coordinator"], "gateway": processes["gateway"]}
    return named | {f"provider-{n}": pid for n, pid in enumerate(processes["providers"], 1)}


def _is_alive(pid: int) -> bool:
    """Whether a child of ours still runs; a zombie that nobody has waited for does not."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _pids(children: list[_Child]) -> dict[str, Any]:
    by_name = {child.name: child.pid for child in children}
    return {
        "coordinator": by_name["coordinator"],
        "gateway": by_name["gateway"],
        "providers": [pid for name, pid in by_name.items() if name.startswith("provider")],
    }


def _commands(plan: DevnetPlan, address: str, port: int) -> dict[str, list[str]]:
    node = [sys.executable, "-m", "pinaivu_node.cli"]
    gateway = [sys.executable, "-m", "pinaivu_gateway.cli"]
    listen = address.split("/p2p/", maxsplit=1)[0]
    commands = {
        "coordinator": [
            *node, "coordinate", "--home", str(plan.home / "coordinator"), "--listen", listen,
            "--welcome-credit", str(WELCOME_CREDIT),
        ],
    }  # fmt: skip
    for number in range(1, plan.providers + 1):
        commands[f"provider-{number}"] = [
            *node, "start", "--home", str(plan.home / f"provider-{number}"),
            "--models-folder", str(plan.models_folder), "--coordinator", address,
            "--listen", "/ip4/127.0.0.1/tcp/0", "--engine", plan.engine,
            *(["--engine-url", plan.engine_url] if plan.engine_url else []),
            *(word for model in plan.models for word in ("--model", model)),
            "--threads", str(plan.threads or max(1, (os.cpu_count() or 1) // plan.providers)),
            # Each asks a little more than the one before, so that auctions have something to say.
            "--price-output", str(200_000_000 + 20_000_000 * (number - 1)),
        ]  # fmt: skip
    commands["gateway"] = [
        *gateway, "serve", "--home", str(plan.home / "gateway"), "--coordinator", address,
        "--listen", f"127.0.0.1:{port}", "--mesh-listen", "/ip4/127.0.0.1/tcp/0",
    ]  # fmt: skip
    return commands


def _coordinator_address(home: Path) -> str:
    """Known before it runs: the key names the peer, and the port is kept with the home."""
    peer = Signer(load_or_create_seed(home)).peer_id
    kept = home / "devnet-port"
    port = int(kept.read_text()) if kept.exists() else _free_port()
    if not _is_free(port):
        raise DevnetError(
            f"port {port} of the coordinator in {home} is taken; is a devnet already running there?"
        )
    kept.write_text(str(port))
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def _api_key(home: Path) -> str:
    """The devnet's own key, kept in its home so that the next start has the same."""
    kept = home / "api-key"
    if kept.exists():
        return kept.read_text().strip()
    command = [
        sys.executable, "-m", "pinaivu_gateway.cli", "keys", "create",
        "--home", str(home / "gateway"), "--name", "devnet", "--json",
    ]  # fmt: skip
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode:
        raise DevnetError(f"cannot create an API key: {done.stderr.decode()[-300:]}")
    key: str = json.loads(done.stdout)["key"]
    descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
    return key


async def _wait_until_ready(plan: DevnetPlan, network: Devnet, children: list[_Child]) -> None:
    headers = {"Authorization": f"Bearer {network.api_key}"}
    with trio.move_on_after(READY_SECONDS):
        async with httpx.AsyncClient(base_url=network.base_url, headers=headers) as client:
            while not await _all_serve(client, plan):
                for child in children:
                    if child.exit_status() is not None:
                        raise DevnetError(f"{child.name} ended: {child.last_words()}")
                await trio.sleep(0.1)
            return
    raise DevnetError(
        f"the network was not ready in {READY_SECONDS} s; see the logs in {network.home}"
    )


async def _all_serve(client: httpx.AsyncClient, plan: DevnetPlan) -> bool:
    """Whether the gateway knows every provider with every model."""
    try:
        answer = await client.get("/nodes")
        nodes = answer.json()["data"] if answer.status_code == 200 else []
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return len(nodes) >= plan.providers and all(
        len(node["models"]) >= len(plan.models) for node in nodes
    )


def stop_signals() -> tuple[signal.Signals, ...]:
    """What ends a devnet cleanly."""
    return (signal.SIGINT, signal.SIGTERM)
