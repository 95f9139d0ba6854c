"""`pinaivu-gateway`: serve OpenAI's API, and keep its keys.  Only here is the environment read."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import trio
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pinaivu_gateway.config import GatewaySettings, load
from pinaivu_gateway.keys import LONGEST_NAME, SECRET_BYTES, ApiKey, hash_of, key_of, prefix_of
from pinaivu_gateway.store import Store, open_store
from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.interpreter import tune_for_latency, tune_for_start
from pinaivu_node.logs import setup_logging
from pinaivu_node.protocol.errors import LocalProtocolError

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # its stubs of trio, which libp2p installs, know no other

app: Final = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="OpenAI's API, served by the Pinaivu network.",
)
keys: Final = typer.Typer(no_args_is_help=True, help="API keys of this gateway.")
app.add_typer(keys, name="keys")
screen: Final = Console(highlight=False)
errors: Final = Console(stderr=True, highlight=False)

T = TypeVar("T")
Home = Annotated[
    Path | None, typer.Option(help="Where key file and database are.", show_default=False)
]
Database = Annotated[
    str | None,
    typer.Option(help="SQLAlchemy URL; default: SQLite in the home.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command(
    epilog="Example: `pinaivu-gateway serve --listen 127.0.0.1:8080 "
    "--coordinator /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW…`"
)
def serve(
    *,
    coordinator: Annotated[
        list[str] | None,
        typer.Option(
            help="The coordinator's multiaddr; repeat for its other addresses, or for others to "
            "turn to when it cannot be reached.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for HTTP; port 0: any.", show_default=False)
    ] = None,
    mesh_listen: Annotated[
        list[str] | None,
        typer.Option(
            help="Multiaddr for peers; /ws or /wss behind it for WebSockets.", show_default=False
        ),
    ] = None,
    mesh_announce: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr to tell others, behind NAT.", show_default=False),
    ] = None,
    mesh_tls_cert: Annotated[
        Path | None,
        typer.Option(help="PEM file, to listen for peers on /wss.", show_default=False),
    ] = None,
    mesh_tls_key: Annotated[
        Path | None,
        typer.Option(help="PEM file, if the key is not beside it.", show_default=False),
    ] = None,
    lan: Annotated[
        bool | None,
        typer.Option(
            "--lan/--no-lan",
            help="Look for a coordinator on the local network if none is named.",
            show_default=False,
        ),
    ] = None,
    relay: Annotated[
        bool | None,
        typer.Option(
            "--relay/--no-relay",
            help="Pass on bytes between peers that cannot dial each other.",
            show_default=False,
        ),
    ] = None,
    relay_through: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr of a relay besides the coordinator.", show_default=False),
    ] = None,
    home: Home = None,
    database: Database = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Serve OpenAI's API until SIGINT or SIGTERM; the first line printed is the base URL."""
    flags = {
        "coordinator": coordinator,
        "listen": listen,
        "mesh_listen": mesh_listen,
        "mesh_announce": mesh_announce,
        "mesh_tls_cert": mesh_tls_cert,
        "mesh_tls_key": mesh_tls_key,
        "lan": lan,
        "relay": relay,
        "relay_through": relay_through,
        "home": home,
        "database": database,
    }
    settings = load(flags, os.environ)
    setup_logging(json=as_json)
    tune_for_start()
    trio.run(_serve, settings, as_json)


async def _serve(settings: GatewaySettings, as_json: bool) -> None:  # noqa: FBT001 - trio.run
    from functools import partial

    from pinaivu_gateway.service import check_coordinators, serve_gateway
    from pinaivu_node.mesh.bootstrap import named_or_found, relays_of
    from pinaivu_node.mesh.config import MeshConfig
    from pinaivu_node.mesh.libp2p import open_libp2p_mesh
    from pinaivu_node.mesh.pipes import RelayLimits
    from pinaivu_node.protocol.signing import Signer

    check_coordinators(settings)  # before anything is opened
    found = await named_or_found(settings.coordinator, lan=settings.lan)
    settings = settings.model_copy(update={"coordinator": found})
    seed = load_or_create_seed(settings.home)
    config = MeshConfig(
        listen=settings.mesh_listen,
        announce=settings.mesh_announce,
        tls_certificate=settings.mesh_tls_cert,
        tls_key=settings.mesh_tls_key,
        relays=relays_of(found, settings.relay_through),
        relay=RelayLimits() if settings.relay else None,
        hub=True,
    )
    stop = trio.Event()
    async with open_libp2p_mesh(config, seed=seed) as mesh, trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, stop, nursery.cancel_scope)
        async with trio.open_nursery() as services:
            run = partial(serve_gateway, mesh, Signer(seed), settings, stop=stop)
            url = await services.start(run)
            tune_for_latency()
            if as_json:
                _print_json({"base_url": url})
            else:
                screen.print(url, soft_wrap=True)
        nursery.cancel_scope.cancel()


async def _stop_on_signal(
    stop: trio.Event,
    scope: trio.CancelScope,
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal lets running answers finish, the second does not."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            logging.getLogger(__name__).info("stopping on %s", signal.Signals(number).name)
            if stop.is_set():
                scope.cancel()
            stop.set()


@keys.command("create", epilog="Example: `pinaivu-gateway keys create --name laptop`")
def create(
    *,
    name: Annotated[str, typer.Option(help="Who it is for.")] = "default",
    home: Home = None,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it: once, it is not kept."""
    key = key_of(secrets.token_bytes(SECRET_BYTES))
    record = ApiKey(
        hash=hash_of(key),
        prefix=prefix_of(key),
        name=name[:LONGEST_NAME],
        tenant=secrets.token_bytes(32),
        created_at=_now(),
    )
    _with_store(home, database, lambda store: store.add_key(record))
    if as_json:
        _print_json({"key": key, **_key_json(record)})
    else:
        print(key)  # noqa: T201 - alone on standard output, for $(…)
        errors.print("[dim]Keep it now: it cannot be shown again.")


@keys.command("list", epilog="Example: `pinaivu-gateway keys list --json`")
def show(*, home: Home = None, database: Database = None, as_json: Json = False) -> None:
    """Every key, without its secret."""
    found = _with_store(home, database, lambda store: store.keys())
    if as_json:
        _print_json([_key_json(each) for each in found])
        return
    table = Table("prefix", "name", "created", "revoked", box=None)
    for each in found:
        table.add_row(
            each.prefix, escape(each.name), _date(each.created_at), _date(each.revoked_at)
        )
    screen.print(table)


@keys.command("revoke", epilog="Example: `pinaivu-gateway keys revoke sk-pnv-AbCdEfGh`")
def revoke(
    prefix: Annotated[str, typer.Argument(help="How the key begins.")],
    *,
    home: Home = None,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Refuse a key from now on; a running gateway notices within a second."""
    found = _with_store(home, database, lambda store: store.revoke_key(prefix, now=_now()))
    if as_json:
        _print_json({"revoked": found.prefix, "name": found.name})
    else:
        screen.print(f"revoked {found.prefix} ({escape(found.name)})")


def _with_store(
    home: Path | None, database: str | None, work: Callable[[Store], Awaitable[T]]
) -> T:
    settings = load({"home": home, "database": database}, os.environ)
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def run() -> T:
        async with open_store(settings.database_url) as store:
            return await work(store)

    return trio.run(run)


def _key_json(key: ApiKey) -> dict[str, Any]:
    return {
        "prefix": key.prefix,
        "name": key.name,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }


def _now() -> Any:
    from pinaivu_gateway.app import unix_clock

    return unix_clock()


def _date(moment: int | None) -> str:
    return "" if moment is None else f"{datetime.fromtimestamp(moment / 1000, UTC):%Y-%m-%d %H:%M}"


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """The entry point: a sentence for what a person can mend, a traceback for our own bugs."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        cause = _only_cause(exc)
        if not _is_explained(cause):
            logging.getLogger(__name__).exception("a bug in pinaivu-gateway; please report it")
            sys.exit(70)
        errors.print(f"[red]pinaivu-gateway:[/] {escape(str(cause))}", soft_wrap=True)
        sys.exit(1)


def _only_cause(exc: BaseException) -> BaseException:
    """What a nursery wrapped, where it wrapped one thing."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc


def _is_explained(exc: BaseException) -> bool:
    """Whether the message was written for the operator: every exception of ours but one is."""
    ours = type(exc).__module__.partition(".")[0] in ("pinaivu_node", "pinaivu_gateway")
    return ours and not isinstance(exc, LocalProtocolError)


if __name__ == "__main__":
    main()
