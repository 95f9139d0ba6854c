"""`scripts/bench`: one subcommand per subject, figures as a table or as one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from scripts.benchmarks import gossip, mesh, network
from scripts.benchmarks.engine import suite as engine

SUBJECTS: Final[dict[str, Any]] = {
    "network": network,
    "mesh": mesh,
    "gossip": gossip,
    "engine": engine,
}
"""Each module has PARTS and `measure`, which returns figures with a list of `targets`; one that
offers more options than `--only` has `add_options`, and `measure` takes them by name."""


def main() -> int:
    """Measure and print; 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, module in SUBJECTS.items():
        subject = subjects.add_parser(name, help=module.__doc__)
        subject.add_argument("--json", action="store_true", help="print one JSON object")
        if hasattr(module, "add_options"):
            module.add_options(subject)
        else:
            subject.add_argument("--only", choices=module.PARTS, help="measure one part")
    options = vars(parser.parse_args())
    as_json, module = options.pop("json"), SUBJECTS[options.pop("subject")]
    figures = module.measure(**options)
    if as_json:
        print(json.dumps(figures))
    else:
        _show(figures)
    return 0 if all(row["met"] is not False for row in figures["targets"]) else 1


def _show(figures: dict[str, Any]) -> None:
    console = Console()
    table = Table("figure", "measured", "target", "")
    for row in figures["targets"]:
        mark = {True: "[green]met", False: "[red]missed", None: ""}[row["met"]]
        table.add_row(row["figure"], row["measured"], row["target"], mark)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
