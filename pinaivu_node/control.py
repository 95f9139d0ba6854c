"""The control socket: how the commands of this machine talk to a running daemon.

One Unix socket in the daemon's home, for its own user alone.  One JSON object per line each way:

    {"command": "status", "arguments": {}}
    {"answer": {...}}   or   {"error": "a sentence"}
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

logger = logging.getLogger(__name__)

Handler = Callable[..., Mapping[str, Any] | Awaitable[Mapping[str, Any]]]
"""Takes the command's arguments by name; ControlError is told to the one who asked."""

SOCKET_FILE: Final = "control.sock"
_MAX_PATH_BYTES: Final = 100
"""Linux takes 107 bytes in a socket's address, macOS 103."""
_MAX_REQUEST_BYTES: Final = 64 * 1024
_MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024
"""A status with every job of a busy coordinator is about one."""
_MAX_CONNECTIONS: Final = 16
"""Commands that run at once; more wait.  They are typed by one person."""
_IDLE_S: Final = 30.0
_ANSWER_S: Final = 30.0
"""What a command waits for its answer; the slowest writes one row to a database."""


class ControlError(Exception):
    """The command could not be carried out; the message says what to do."""


class NotRunning(ControlError):
    """There is nobody to ask."""


def socket_path(home: Path) -> Path:
    """Where the daemon of this home listens.

    In the home itself; where that is too long for the address of a Unix socket, in a folder of
    this user's own among the temporary files, under a name made from the home's.
    """
    path = home.absolute() / SOCKET_FILE
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        return path
    name = hashlib.sha256(os.fsencode(home.absolute())).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"pinaivu-{os.getuid()}" / f"{name}.sock"


async def serve_control(
    path: Path, handlers: Mapping[str, Handler], *, task_status: TaskStatus[None]
) -> None:
    """Answer commands on this socket until cancelled, then remove it.

    Ready when commands are taken.  Raises ControlError if another daemon listens there, or if the
    socket cannot be made.  A handler that fails is logged and its error told to the one who asked.
    """
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(path)))
    inode = _inode(path)
    places = trio.CapacityLimiter(_MAX_CONNECTIONS)

    async def serve(stream: trio.SocketStream) -> None:
        async with places:
            await _serve_commands(stream, handlers)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(trio.serve_listeners, serve, [listener]))
            task_status.started()
    finally:
        _remove(path, inode)


def ask(path: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """The running daemon's answer to a command; ControlError.  For programs without a trio run."""
    return trio.run(partial(request, path, command, **arguments))


async def request(path: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """The running daemon's answer to a command.

    Raises ControlError if no daemon listens, if it refuses, or if it does not answer in time.
    """
    line = json.dumps({"command": command, "arguments": arguments}).encode() + b"\n"
    try:
        with trio.fail_after(_ANSWER_S):
            async with await _connect(path) as stream:
                await stream.send_all(line)
                answer = await _Lines(stream, limit=_MAX_ANSWER_BYTES).next()
    except trio.TooSlowError:
        raise ControlError(f"the daemon did not answer within {_ANSWER_S:g} s") from None
    except (trio.BrokenResourceError, OSError) as exc:
        raise ControlError(f"the daemon hung up: {exc}") from exc
    return _answer_of(answer)


async def _connect(path: Path) -> trio.SocketStream:
    try:
        stream = await trio.open_unix_socket(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(
            "no daemon is running for this home: start one with `pinaivu-node start`, "
            "or name its home with --home"
        ) from None
    except PermissionError:
        raise ControlError(f"{path} belongs to another user: ask as the daemon's own") from None
    except OSError as exc:
        raise ControlError(f"cannot use {path}: {exc.strerror or exc}") from exc
    assert isinstance(stream, trio.SocketStream)  # noqa: S101 - trio says so
    return stream


def _answer_of(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ControlError("the daemon hung up without an answer: its log says why")
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    match message:
        case {"answer": dict(answer)}:
            return answer
        case {"error": str(error)}:
            raise ControlError(error)
        case _:
            raise ControlError("the daemon's answer cannot be understood: is it another version?")


# --- the daemon's side ----------------------------------------------------------------------------


def _listen(path: Path) -> socket.socket:
    try:
        _make_private(path.parent)
        _clear_stale(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(os.fspath(path))
            # Nobody can connect before `listen`, so nobody comes in before the mode is right.
            path.chmod(0o600)
            listening.listen(_MAX_CONNECTIONS)
        except BaseException:
            listening.close()
            raise
    except OSError as exc:
        raise ControlError(f"cannot make {path}: {exc.strerror or exc}") from exc
    return listening


def _make_private(folder: Path) -> None:
    """See that the folder is there, and that no other user has put it there for us to use."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & stat.S_IWOTH:
        raise ControlError(f"{folder} can be changed by other users: remove it, or chmod it 700")


def _clear_stale(path: Path) -> None:
    """Remove a socket whose daemon was killed; ControlError if it still listens."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ControlError(f"{path} is no socket: remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.0)  # a daemon whose queue is full is a living one
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise ControlError(f"a daemon is running for {path.parent}: stop it first")


def _remove(path: Path, inode: int | None) -> None:
    """Remove our socket, and not one that another daemon has made in its place since."""
    if _inode(path) == inode:
        path.unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


async def _serve_commands(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    lines = _Lines(stream, limit=_MAX_REQUEST_BYTES)
    async with stream:
        try:
            while True:
                with trio.fail_after(_IDLE_S):
                    line = await lines.next()
                if line is None:
                    return
                reply = await _reply_to(line, handlers)
                with trio.fail_after(_IDLE_S):
                    await stream.send_all(reply)
        except (trio.BrokenResourceError, trio.TooSlowError, ControlError) as exc:
            logger.debug("a control connection ended: %s", exc)


async def _reply_to(line: bytes, handlers: Mapping[str, Handler]) -> bytes:
    try:
        reply: dict[str, Any] = {"answer": await _carry_out(line, handlers)}
        return json.dumps(reply).encode() + b"\n"
    except ControlError as exc:
        reply = {"error": str(exc)}
    except Exception:
        logger.exception("a control command failed")
        reply = {"error": "the daemon failed at it: its log says why"}
    return json.dumps(reply).encode() + b"\n"


async def _carry_out(line: bytes, handlers: Mapping[str, Handler]) -> Mapping[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ControlError(f"not JSON: {exc}") from exc
    match message:
        case {"command": str(command), "arguments": dict(arguments)}:
            pass
        case {"command": str(command)}:
            arguments = {}
        case _:
            raise ControlError('a request is {"command": …, "arguments": {…}}')
    handler = handlers.get(command)
    if handler is None:
        known = ", ".join(sorted(handlers))
        raise ControlError(f"this daemon knows no {command[:40]!r}; it knows {known}")
    try:
        inspect.signature(handler).bind(**arguments)
    except TypeError as exc:
        raise ControlError(f"{command}: {exc}") from exc
    answer = handler(**arguments)
    return await answer if inspect.isawaitable(answer) else answer


class _Lines:
    """Lines of a byte stream, none longer than `limit`."""

    def __init__(self, stream: trio.abc.ReceiveStream, *, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """The next line without its end; None at the stream's end; ControlError if too long."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            if len(self._buffer) > self._limit:
                raise ControlError(f"a line is longer than {self._limit} bytes")
            searched = len(self._buffer)
            received = await self._stream.receive_some()
            if not received:
                return None
            self._buffer += received
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
