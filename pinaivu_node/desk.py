"""What an operator may ask of a running daemon, over its control socket."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pinaivu_node import control
from pinaivu_node.coordinator.service import Coordinator
from pinaivu_node.doctor import diagnose
from pinaivu_node.mesh.mesh import Mesh
from pinaivu_node.protocol.ids import NanoX, PeerId, public_key_of
from pinaivu_node.provider.service import Provider


def provider_handlers(
    provider: Provider, mesh: Mesh, coordinator: PeerId
) -> Mapping[str, control.Handler]:
    """Of a provider: status, drain, resume, doctor."""

    def status() -> dict[str, Any]:
        return {
            "role": "provider",
            "addresses": list(mesh.addresses),
            **asdict(provider.statistics()),
            "mesh": asdict(mesh.statistics()),
        }

    def drain() -> dict[str, Any]:
        provider.drain()
        return {"draining": True}

    def resume() -> dict[str, Any]:
        provider.resume()
        return {"draining": False}

    def doctor() -> dict[str, Any]:
        return diagnose(mesh, coordinator)

    return {"status": status, "drain": drain, "resume": resume, "doctor": doctor}


def coordinator_handlers(coordinator: Coordinator, mesh: Mesh) -> Mapping[str, control.Handler]:
    """Of a coordinator: status, accounts, deposit."""

    def status() -> dict[str, Any]:
        return {
            "role": "coordinator",
            "peer_id": mesh.peer_id,
            "addresses": list(mesh.addresses),
            **asdict(coordinator.statistics()),
            "mesh": asdict(mesh.statistics()),
        }

    async def accounts() -> dict[str, Any]:
        return {str(name): balance for name, balance in (await coordinator.accounts()).items()}

    async def deposit(peer: str, amount: int, key: str | None = None) -> dict[str, Any]:
        """`key` makes a repeated request harmless."""
        try:
            public_key_of(PeerId(peer))
        except ValueError as exc:
            raise control.ControlError(f"{peer!r} is no PeerID") from exc
        key = key or secrets.token_hex(16)
        posted = await coordinator.deposit(PeerId(peer), NanoX(amount), key)
        return {"peer": peer, "amount": amount, "key": key, "posted": posted}

    return {"status": status, "accounts": accounts, "deposit": deposit}
