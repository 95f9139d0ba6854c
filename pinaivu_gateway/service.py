"""A gateway from end to end: its database, its place in the market, its HTTP listener."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from pinaivu_gateway.app import serve_http, unix_clock
from pinaivu_gateway.config import ConfigError, GatewaySettings
from pinaivu_gateway.context import Clock
from pinaivu_gateway.http_server import bind
from pinaivu_gateway.market import MarketConfig, open_market
from pinaivu_gateway.store import RunSync, open_store
from pinaivu_node.mesh.bootstrap import by_peer, join_coordinator
from pinaivu_node.mesh.mesh import Mesh, PeerUnreachable
from pinaivu_node.protocol.signing import Signer

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other


OWNER_ONLY: Final = 0o700


async def serve_gateway(  # noqa: PLR0913 - the composition root of a gateway
    mesh: Mesh,
    signer: Signer,
    settings: GatewaySettings,
    *,
    clock: Clock = unix_clock,
    stop: trio.Event | None = None,
    run_sync: RunSync | None = None,
    task_status: TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set, then finish what runs; or until cancelled, which cuts it.

    Starts with the base URL for OpenAI's clients.  `run_sync` does one blocking call of the
    database; by default in a thread.  Raises ConfigError, ListenError, StoreError.
    """
    check_coordinators(settings)
    settings.home.mkdir(parents=True, exist_ok=True, mode=OWNER_ONLY)
    listener = bind(settings.listen)
    try:
        coordinator = await join_coordinator(mesh, settings.coordinator)
        address = by_peer(settings.coordinator)[coordinator][0]
        async with (
            open_store(settings.database_url, run_sync=run_sync) as store,
            open_market(mesh, signer, address, store, MarketConfig(), clock=clock) as market,
        ):
            await serve_http(
                market,
                store,
                listener,
                settings.http,
                mesh=mesh,
                clock=clock,
                stop=stop,
                task_status=task_status,
            )
    finally:
        listener.close()


def check_coordinators(settings: GatewaySettings) -> None:
    """ConfigError unless somebody is named who could be dialled."""
    try:
        if by_peer(settings.coordinator) or settings.lan:
            return
        fault = "which coordinator?"
    except PeerUnreachable as exc:
        fault = f"which coordinator? {exc}."
    raise ConfigError(
        f"{fault} Give --coordinator /ip4/…/tcp/4001/p2p/12D3KooW…, or set `coordinator` in "
        f"{settings.home / 'config.toml'}"
    )
