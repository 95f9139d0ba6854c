"""Finding a coordinator on the local network by mDNS, where operators ask for it.

A coordinator advertises `_pinaivu._tcp.local.` with its multiaddrs; whoever has no address of one
looks for that.  Anybody on the network may advertise: the connection proves that a peer is who its
address says, and nothing proves that it is a coordinator one would choose.

zeroconf runs in a thread of its own; nothing here waits for it in trio's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import trio
from zeroconf import (
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceListener,
    Zeroconf,
)

from pinaivu_node.mesh.address import is_circuit, split_address
from pinaivu_node.mesh.mesh import MeshError, PeerUnreachable
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

SERVICE: Final = "_pinaivu._tcp.local."
_MAX_ADDRESSES: Final = 8
"""Of one coordinator: as many as a roster tells."""
_MAX_FOUND: Final = 64
"""Addresses not yet taken up: a network with more coordinators than fit is somebody's joke."""
_RESOLVE_MS: Final = 2000
_LABEL_CHARACTERS: Final = 63
"""The longest name that DNS takes; a PeerID has 52."""

Interfaces = InterfaceChoice | Sequence[str]


@asynccontextmanager
async def advertised(
    peer: PeerId, addresses: Sequence[str], *, interfaces: Interfaces = InterfaceChoice.All
) -> AsyncIterator[None]:
    """Let others on the local network find this coordinator while the block runs.

    Raises MeshError if there is no network on which that could be said.
    """
    described = {f"address{number}": each for number, each in enumerate(addresses[:_MAX_ADDRESSES])}
    name = f"{peer[-_LABEL_CHARACTERS:]}.{SERVICE}"
    hosts, port = _hosts_and_port(addresses)
    info = ServiceInfo(
        SERVICE,
        name,
        port=port,
        properties=described,
        server=f"{peer[-_LABEL_CHARACTERS:]}.local.",
        parsed_addresses=hosts,
    )
    async with _zeroconf(interfaces) as zeroconf:
        # Nobody else has this name, so we need not ask for a second whether somebody does.
        register = partial(zeroconf.register_service, info, cooperating_responders=True)
        await trio.to_thread.run_sync(register)
        yield


async def find_coordinator(*, interfaces: Interfaces = InterfaceChoice.All) -> tuple[str, ...]:
    """The multiaddrs of the first coordinator that is heard of; waits until there is one.

    Raises MeshError if there is no network to look on.
    """
    send, receive = trio.open_memory_channel[tuple[str, ...]](_MAX_FOUND)
    token = trio.lowlevel.current_trio_token()

    def hear(addresses: tuple[str, ...]) -> None:
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            send.send_nowait(addresses)

    def tell(addresses: tuple[str, ...]) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(hear, addresses)

    async with _zeroconf(interfaces) as zeroconf, receive:
        browser = ServiceBrowser(zeroconf, SERVICE, listener=_Listener(tell))
        try:
            return await receive.receive()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(browser.cancel)


class _Listener(ServiceListener):
    """Called in zeroconf's thread."""

    def __init__(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        self._tell = tell

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody advertises."""
        try:
            info = zc.get_service_info(type_, name, _RESOLVE_MS)
        except Exception as exc:  # noqa: BLE001 - hostile bytes in a library's hands
            logger.debug("an advertisement that is none: %r", exc)
            return
        if info is not None and (addresses := addresses_of_untrusted(info.properties)):
            self._tell(addresses)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """It advertises other addresses."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """It has left; whoever is connected notices in other ways."""


def addresses_of_untrusted(properties: dict[bytes, bytes | None]) -> tuple[str, ...]:
    """What an advertisement says of one coordinator; empty if it says nothing that we can use."""
    found: dict[str, PeerId] = {}
    for number in range(_MAX_ADDRESSES):
        value = properties.get(b"address%d" % number) or b""
        try:
            address = value.decode("ascii")
            _, peer = split_address(address)
        except (UnicodeDecodeError, PeerUnreachable):
            continue
        if not is_circuit(address):
            found[address] = peer
    first = next(iter(found.values()), None)
    return tuple(address for address, peer in found.items() if peer == first)


@asynccontextmanager
async def _zeroconf(interfaces: Interfaces) -> AsyncIterator[Zeroconf]:
    def start() -> Zeroconf:
        return Zeroconf(interfaces=interfaces)

    try:
        zeroconf = await trio.to_thread.run_sync(start)
    except (OSError, RuntimeError) as exc:
        raise MeshError(f"nobody can be looked for on the local network: {exc}") from exc
    try:
        yield zeroconf
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(zeroconf.close)


def _hosts_and_port(addresses: Sequence[str]) -> tuple[list[str], int]:
    """What DNS has to have of a service; ours reads the multiaddrs instead."""
    parts = [address.split("/") for address in addresses]
    hosts = [words[2] for words in parts if words[1] in ("ip4", "ip6")]
    ports = [int(words[4]) for words in parts if words[3] == "tcp"]
    return hosts or ["127.0.0.1"], next(iter(ports), 0)
