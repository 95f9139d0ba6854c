"""Which ways a peer has to others, and what its operator may do for better ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import Link, Mesh, Path, PeerUnreachable
from pinaivu_node.protocol.ids import PeerId

_SEED_BYTES = 32


def diagnose(mesh: Mesh, coordinator: PeerId) -> dict[str, Any]:
    """What a provider is told about its place in the network."""
    links = mesh.links()
    home = [link for link in links if link.peer == coordinator]
    others = [link for link in links if link.peer != coordinator]
    return {
        "coordinator": [_told(link) for link in home] or "not connected",
        "gateways": [_told(link) for link in sorted(others, key=lambda link: link.peer)],
        "addresses": list(mesh.addresses),
        "advice": advice(home, others),
    }


def advice(home: Sequence[Link], others: Sequence[Link]) -> list[str]:
    """What to do, one sentence each; of links to the coordinator and to gateways.  Pure."""
    told = []
    if not home:
        told.append(
            "The coordinator cannot be reached: check --coordinator and the firewall. Where only "
            "HTTP ports are let out, give its address that ends in /wss or /ws as well."
        )
    elif all(link.path is Path.WEBSOCKET for link in home):
        told.append("The coordinator is reached by WebSocket, which costs a little CPU and no job.")
    relayed = {link.peer for link in others if link.path is Path.RELAYED}
    relayed -= {link.peer for link in others if link.path is not Path.RELAYED}
    if relayed:
        told.append(
            f"Gateways reached through a relay only: {len(relayed)}. Their tokens take the way "
            "around; for a direct one forward a port of your router to this machine, and start "
            "with --listen /ip4/0.0.0.0/tcp/PORT --announce /ip4/YOUR-PUBLIC-ADDRESS/tcp/PORT."
        )
    if home and not others:
        told.append("No gateway is connected; those of the market are dialled as they come.")
    if not told:
        told.append("All is well.")
    if any(not link.dialled and link.path is not Path.RELAYED for link in others):
        told.append("Others can dial us.")
    elif home:
        told.append("Nobody has dialled us; we dial out, and need no open port for that.")
    return told


def _told(link: Link) -> dict[str, Any]:
    return {
        "peer": link.peer,
        "path": link.path.value,
        "remote": link.remote,
        "dialled_by": "us" if link.dialled else "them",
        "round_trip_ms": link.round_trip_ms,
    }


async def probe(addresses: Iterable[str], proxy: str | None = None) -> list[dict[str, Any]]:
    """Whether a coordinator answers at each of these addresses, and how fast.

    Dials under a name that was never used before.
    """
    told = []
    for address in addresses:
        seed = os.urandom(_SEED_BYTES)
        async with open_libp2p_mesh(MeshConfig(listen=(), proxy=proxy), seed=seed) as mesh:
            started_at = time.perf_counter()
            try:
                await mesh.dial(address)
            except PeerUnreachable as exc:
                told.append({"address": address, "reached": False, "reason": str(exc)})
            else:
                taken = round(1000 * (time.perf_counter() - started_at), 1)
                told.append({"address": address, "reached": True, "connected_in_ms": taken})
    return told
