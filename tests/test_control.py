from __future__ import annotations

import json
import socket
import stat
import tempfile
from functools import partial

import pytest
import trio

from pinaivu_node import control
from pinaivu_node.control import ControlError, request, serve_control, socket_path


@pytest.fixture
def path(tmp_path):
    return socket_path(tmp_path)


@pytest.fixture
def short_folder():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


def status():
    return {"running": 3}


async def deposit(*, peer: str, amount: int):
    await trio.lowlevel.checkpoint()
    if amount < 0:
        raise ControlError("a deposit is more than nothing")
    return {"peer": peer, "balance": amount}


def broken():
    raise RuntimeError("secret details")


@pytest.fixture
async def daemon(path, nursery):
    handlers = {"status": status, "deposit": deposit, "broken": broken}
    await nursery.start(partial(serve_control, path, handlers))
    return path


async def test_a_command_is_answered(daemon):
    assert await request(daemon, "status") == {"running": 3}


async def test_an_awaiting_handler_gets_its_arguments_by_name(daemon):
    assert await request(daemon, "deposit", peer="12D", amount=5) == {"peer": "12D", "balance": 5}


def test_the_client_works_without_a_trio_run(path):
    async def serve_and_ask():
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_control, path, {"status": status}))
            answer = await trio.to_thread.run_sync(control.ask, path, "status")
            nursery.cancel_scope.cancel()
        return answer

    assert trio.run(serve_and_ask) == {"running": 3}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("fly", {}, "knows no 'fly'; it knows broken, deposit, status"),
        ("deposit", {"peer": "12D"}, "amount"),
        ("deposit", {"peer": "12D", "amount": -1}, "a deposit is more than nothing"),
        ("broken", {}, "its log says why"),
    ],
)
async def test_a_refusal_says_why(daemon, command, arguments, message):
    with pytest.raises(ControlError, match=message):
        await request(daemon, command, **arguments)


async def test_only_the_user_may_use_the_socket(daemon):
    assert stat.S_IMODE(daemon.stat().st_mode) == 0o600


async def test_without_a_daemon_the_error_says_what_to_do(path):
    with pytest.raises(ControlError, match="no daemon is running for this home: start one"):
        await request(path, "status")


async def test_the_socket_of_a_killed_daemon_is_replaced(path, nursery):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ControlError, match="no daemon is running"):
        await request(path, "status")
    await nursery.start(partial(serve_control, path, {"status": status}))
    assert await request(path, "status") == {"running": 3}


async def test_a_second_daemon_of_one_home_is_refused(daemon):
    with pytest.raises(ControlError, match="a daemon is running"):
        await serve_control(daemon, {}, task_status=trio.TASK_STATUS_IGNORED)
    assert await request(daemon, "status") == {"running": 3}


async def test_the_socket_is_gone_when_the_daemon_is(path):
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, path, {}))
        assert path.exists()
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_long_home_has_its_socket_elsewhere(tmp_path, short_folder, nursery, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", short_folder)
    home = tmp_path / ("deep/" * 30)
    path = socket_path(home)
    assert path != home / "control.sock"
    assert path == socket_path(home)
    assert path != socket_path(home / "other")
    await nursery.start(partial(serve_control, path, {"status": status}))
    assert await request(path, "status") == {"running": 3}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "line",
    [b"rubbish\n", b"[1, 2]\n", b'{"command": 7}\n', b"[" * 50_000 + b"\n", b"\xff\xfe\n", b"\n"],
)
async def test_rubbish_gets_an_error_and_the_next_command_its_answer(daemon, line):
    async with await trio.open_unix_socket(daemon) as stream:
        lines = control._Lines(stream, limit=100_000)
        await stream.send_all(line)
        assert "error" in json.loads(await lines.next())
        await stream.send_all(b'{"command": "status"}\n')
        assert json.loads(await lines.next()) == {"answer": {"running": 3}}


async def test_an_endless_line_ends_the_connection(daemon):
    async with await trio.open_unix_socket(daemon) as stream:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x" * 10_000_000)
    assert await request(daemon, "status") == {"running": 3}
