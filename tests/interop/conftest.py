"""Peers of other makers, each a process that takes orders."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

HERE = Path(__file__).parent


class OtherPeer:
    """Takes one order at a time; what it hears by gossip is kept apart from its answers."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = trio.Condition()
        self.heard: list[str] = []
        self.address = ""

    async def listen(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED):
        rest = b""
        async for chunk in self._process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            async with self._news:
                for line in lines:
                    self._note(json.loads(line))
                self._news.notify_all()
            if lines and self.address:
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED

    def _note(self, facts: dict[str, Any]) -> None:
        match facts:
            case {"address": address}:
                self.address = address
            case {"heard": text}:
                self.heard.append(text)
            case {"answer": number}:
                self._answers[number] = facts

    async def do(self, what: str, **details: Any) -> dict[str, Any]:
        number = next(self._numbers)
        order = {"id": number, "do": what, **details}
        await self._process.stdin.send_all(json.dumps(order).encode() + b"\n")
        async with self._news:
            while number not in self._answers:
                await self._news.wait()
        facts = self._answers.pop(number)
        assert "error" not in facts, facts["error"]
        return facts

    async def has_heard(self, wanted: Callable[[str], bool]) -> None:
        async with self._news:
            while not any(wanted(text) for text in self.heard):
                await self._news.wait()


@asynccontextmanager
async def running(*command: str | Path) -> AsyncIterator[OtherPeer]:
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            check=False,
        )
        process = await nursery.start(run)
        peer = OtherPeer(process)
        await nursery.start(peer.listen)
        try:
            yield peer
        finally:
            process.kill()
            nursery.cancel_scope.cancel()


@pytest.fixture(scope="session")
def js_folder() -> Path:
    """A folder with js-libp2p in it, made anew when what it is made of changes."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here: js-libp2p cannot run")
    lock = (HERE / "js" / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "pinaivu-test" / f"js-libp2p-{hashlib.sha256(lock).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (HERE / "js").iterdir():
        shutil.copy(source, folder)
    if not (folder / "complete").exists():
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "complete").touch()
    return folder


Starter = Callable[..., AbstractAsyncContextManager[OtherPeer]]
"""Takes /ws for a peer that speaks WebSocket."""


@pytest.fixture
def start_js(js_folder: Path) -> Starter:
    polyfill = js_folder / "polyfill.mjs"
    return lambda *suffix: running("node", "--import", polyfill, js_folder / "peer.mjs", *suffix)


@pytest.fixture
def start_py() -> Starter:
    return lambda *suffix: running(sys.executable, HERE / "stock_peer.py", *suffix)


@pytest.fixture(params=["js-libp2p", "py-libp2p"])
def start_other(request: pytest.FixtureRequest) -> Starter:
    starter: Starter = request.getfixturevalue(
        "start_js" if request.param == "js-libp2p" else "start_py"
    )
    return starter
