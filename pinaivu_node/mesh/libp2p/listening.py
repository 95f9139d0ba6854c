"""Listening: to a port that is ours alone, and to what the swarm tells."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Final

import ifaddr

from pinaivu_node.mesh.mesh import MeshError

_WEBSOCKETS: Final = {(): False, ("ws",): False, ("wss",): True, ("tls", "ws"): True}
"""What may come behind the port, and whether it needs a certificate."""
_WILDCARDS: Final = ("0.0.0.0", "::")  # noqa: S104 - to tell them from addresses
_MAX_INTERFACES: Final = 4
"""Told of at most: containers bring a dozen, and every one is a dial in vain for somebody."""


def check_listenable(address: str, *, has_certificate: bool) -> None:
    """MeshError if this is no address to listen on, or somebody does already.

    libp2p would share the port with another process and say nothing.
    """
    parts = address.split("/")
    suffix = tuple(parts[5:])
    is_address = len(parts) >= 5 and parts[1] in {"ip4", "ip6"} and parts[3] == "tcp"
    if not is_address or suffix not in _WEBSOCKETS:
        raise MeshError(
            f"cannot listen on {address!r}: write it like /ip4/0.0.0.0/tcp/4001, with /ws or /wss "
            "behind it for WebSockets"
        )
    if _WEBSOCKETS[suffix] and not has_certificate:
        raise MeshError(f"cannot listen on {address}: give a certificate for it, or listen on /ws")
    _refuse_taken_port(address, parts)


def _refuse_taken_port(address: str, parts: list[str]) -> None:
    family = socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # With it a port in TIME_WAIT is free, and one that is listened on is still taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts[2], int(parts[4])))
            probe.listen(1)
        except (OSError, OverflowError, ValueError) as exc:
            taken = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
            reason = "the port is taken by another process" if taken else str(exc)
            raise MeshError(f"cannot listen on {address}: {reason}") from exc


def spelled_out(address: str) -> list[str]:
    """The addresses of this machine's interfaces, where we listen on all of them.

    The wildcard would lead whoever dials it to itself.  Loopback is named only if there is nothing
    else, and link-local addresses, which mean nothing without their interface, never.
    """
    _, version, host, rest = address.split("/", 3)
    if host not in _WILDCARDS:
        return [address]
    found = [
        ip
        for adapter in ifaddr.get_adapters()
        for ip in (each.ip if isinstance(each.ip, str) else each.ip[0] for each in adapter.ips)
        if (":" in ip) == (version == "ip6") and not ipaddress.ip_address(ip).is_link_local
    ]
    outward = [ip for ip in found if not ipaddress.ip_address(ip).is_loopback]
    return [f"/{version}/{ip}/{rest}" for ip in (outward or found)[:_MAX_INTERFACES]] or [address]


class Notifee:
    """What the swarm tells; it must never wait, or it holds up the connection it tells of."""

    def __init__(
        self, connected: Callable[[Any], None], disconnected: Callable[[Any], None]
    ) -> None:
        self._connected = connected
        self._disconnected = disconnected

    async def connected(self, _network: Any, connection: Any) -> None:
        """A connection is up, its peer proven."""
        self._connected(connection)

    async def disconnected(self, _network: Any, connection: Any) -> None:
        """A connection is gone, or was refused before it was announced."""
        self._disconnected(connection)

    async def opened_stream(self, _network: Any, _stream: Any) -> None:
        """Nothing to us."""

    async def closed_stream(self, _network: Any, _stream: Any) -> None:
        """Nothing to us."""

    async def listen(self, _network: Any, _address: Any) -> None:
        """Nothing to us."""

    async def listen_close(self, _network: Any, _address: Any) -> None:
        """Nothing to us."""
