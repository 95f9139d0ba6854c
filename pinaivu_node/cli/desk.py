"""Commands that ask a running daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import trio
import typer

from pinaivu_node import config
from pinaivu_node.cli import Json, app, print_json, show_mapping
from pinaivu_node.cli.daemons import Coordinators
from pinaivu_node.config import DATA_FOLDER, ProviderSettings


def _daemon_command(command: str, explanation: str) -> None:
    """Register a command that is answered by the running daemon of a home."""

    def ask(
        *,
        home: Annotated[Path, typer.Option(help="Whose daemon.")] = DATA_FOLDER / "provider",
        as_json: Json = False,
    ) -> None:
        from pinaivu_node import control

        answer = control.ask(control.socket_path(home), command)
        if as_json:
            print_json(answer)
        else:
            show_mapping(answer)

    ask.__doc__ = explanation
    app.command(command)(ask)


_daemon_command("status", "What the daemon of this home is doing.")
_daemon_command("drain", "Take no new jobs; finish the running ones.")
_daemon_command("resume", "Take jobs again.")


@app.command(epilog="Example: `pinaivu-node doctor --json`")
def doctor(
    *,
    home: Annotated[Path, typer.Option(help="Whose daemon.")] = DATA_FOLDER / "provider",
    coordinator: Coordinators = None,
    as_json: Json = False,
) -> None:
    """Which ways this provider has to others (direct, websocket, relayed), and what to do.

    If it does not run: which of the coordinator's addresses answer.
    """
    from pinaivu_node import control

    try:
        answer = control.ask(control.socket_path(home), "doctor")
    except control.NotRunning:
        from pinaivu_node.doctor import probe

        flags = {"home": home, "coordinator": coordinator}
        settings = config.load(ProviderSettings, flags, os.environ)
        proxy = settings.proxy.get_secret_value() if settings.proxy else None
        answer = {"running": False, "coordinators": trio.run(probe, settings.coordinator, proxy)}
    if as_json:
        print_json(answer)
    else:
        show_mapping(answer)


@app.command()
def accounts(
    *,
    home: Annotated[Path, typer.Option(help="The coordinator's home.")] = DATA_FOLDER
    / "coordinator",
    as_json: Json = False,
) -> None:
    """Every account of the coordinator's ledger, in NanoX; they sum to zero."""
    from pinaivu_node import control

    answer = control.ask(control.socket_path(home), "accounts")
    if as_json:
        print_json(answer)
    else:
        show_mapping(answer)


@app.command(epilog="Example: `pinaivu-node deposit 12D3KooW… 5000000000 --home …`")
def deposit(
    peer: Annotated[str, typer.Argument(help="The gateway's PeerID.")],
    amount: Annotated[int, typer.Argument(min=1, help="NanoX.")],
    *,
    home: Annotated[Path, typer.Option(help="The coordinator's home.")] = DATA_FOLDER
    / "coordinator",
    as_json: Json = False,
) -> None:
    """Credit a gateway's account at the coordinator of this home."""
    from pinaivu_node import control

    answer = control.ask(control.socket_path(home), "deposit", peer=peer, amount=amount)
    if as_json:
        print_json(answer)
    else:
        show_mapping(answer)
