"""`pinaivu-node`: the commands of the daemon.  The only package that reads the environment."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from pinaivu_node.protocol.errors import LocalProtocolError

app: Final = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Serve models to the Pinaivu network, or coordinate one.",
)
screen: Final = Console(highlight=False)
errors: Final = Console(stderr=True, highlight=False)

Home = Annotated[
    Path | None, typer.Option(help="Where this daemon keeps its key and state.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ModelsFolder = Annotated[
    Path | None, typer.Option(help="Where weights are kept.", show_default=False)
]


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def show_mapping(answer: dict[str, Any]) -> None:
    """Keys and values, one a line."""
    width = max((len(key) for key in answer), default=0)
    for key, value in answer.items():
        text = json.dumps(value) if isinstance(value, dict | list) else str(value)
        screen.print(f"[bold]{key:<{width}}[/]  {escape(text)}", soft_wrap=True)


def main() -> None:
    """The entry point: a sentence for what a person can mend, a traceback for our own bugs."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        cause = _only_cause(exc)
        if not _is_explained(cause):
            logging.getLogger(__name__).exception("a bug in pinaivu-node; please report it")
            sys.exit(70)
        errors.print(f"[red]pinaivu-node:[/] {escape(str(cause))}", soft_wrap=True)
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


# At the bottom, since each registers its commands with `app`.
from pinaivu_node.cli import daemons, desk, models, receipts  # noqa: E402

__all__ = ["app", "daemons", "desk", "main", "models", "receipts"]
