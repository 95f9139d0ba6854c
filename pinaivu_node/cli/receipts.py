"""Commands that check what the network says about a request."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic_core import to_jsonable_python
from rich.markup import escape
from rich.table import Table

from pinaivu_node.cli import Json, app, print_json, screen
from pinaivu_node.protocol.ids import PeerId

Subject = Annotated[str, typer.Argument(help="A request id, or a file saved from the gateway.")]
Gateway = Annotated[str, typer.Option(help="Whom to fetch it from.")]
ApiKey = Annotated[
    str | None, typer.Option(help="If the gateway asks for one.", envvar="PINAIVU_GATEWAY_API_KEY")
]
DEFAULT_GATEWAY: Final = "http://127.0.0.1:8080/v1"
_MARKS: Final = {"holds": "[green]✓[/]", "fails": "[red]✗[/]", "unchecked": "[yellow]?[/]"}


@app.command(epilog="Example: `pinaivu-node verify req_0123… --coordinator 12D3KooW…`")
def verify(
    subject: Subject,
    *,
    gateway: Gateway = DEFAULT_GATEWAY,
    api_key: ApiKey = None,
    coordinator: Annotated[
        str | None,
        typer.Option(help="The PeerID that you trust to have signed it.", show_default=False),
    ] = None,
    answer: Annotated[
        list[Path] | None,
        typer.Option(
            help="The text you received; of several answers (n) repeat it, in their order.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a receipt: every check is named, one a line; exit 1 if any fails."""
    from pinaivu_node.evidence import fetch_evidence, request_id_in
    from pinaivu_node.verification import Expectation, Verdict
    from pinaivu_node.verification import verify as checks_of

    evidence = fetch_evidence(subject, gateway=gateway, api_key=api_key)
    expectation = Expectation(
        request_id=request_id_in(subject),
        coordinator=PeerId(coordinator) if coordinator else None,
        answers=tuple(path.read_text() for path in answer or ()),
    )
    checks = list(checks_of(evidence, expectation))
    if as_json:
        rows = [
            {"check": each.name, "verdict": each.verdict.value, "detail": each.detail}
            for each in checks
        ]
        print_json(rows)
    else:
        width = max(len(each.name) for each in checks)
        for each in checks:
            mark = _MARKS[each.verdict.value]
            screen.print(f"{mark} {each.name:<{width}}  [dim]{escape(each.detail)}", soft_wrap=True)
    if any(each.verdict is Verdict.FAILS for each in checks):
        raise typer.Exit(1)


def _short(peer: str) -> str:
    """Every Ed25519 PeerID begins alike; its end tells them apart."""
    return f"{peer[:8]}…{peer[-8:]}"


@app.command(epilog="Example: `pinaivu-node replay req_0123…`")
def replay(
    subject: Subject,
    *,
    gateway: Gateway = DEFAULT_GATEWAY,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Hold the auction again from its bid set: who should have won, and why each loser lost."""
    from pinaivu_node.coordinator.auction import decide, open_bid_set_untrusted
    from pinaivu_node.evidence import EvidenceError, fetch_evidence

    evidence = fetch_evidence(subject, gateway=gateway, api_key=api_key)
    if evidence.leaves is None:
        raise EvidenceError(f"the bid set of {subject} was not handed over")
    record, answers = open_bid_set_untrusted(evidence.leaves)
    result = decide(record, answers)
    if as_json:
        print_json(to_jsonable_python(asdict(result)))
        return
    table = Table("", "provider", "asks", "takes", "uplift", "is paid", box=None, pad_edge=False)
    for award in result.awards:
        table.add_row(
            "winner" if award.rank == 0 else f"standby {award.rank}",
            escape(_short(award.provider)),
            f"{award.expected_cost:,} NanoX",
            f"{award.expected_time_ms:,} ms",
            f"{award.uplift_ppm / 10_000:g} %",
            f"{award.pay:,} NanoX",
        )
    screen.print(table)
    for loser in result.losers:
        screen.print(f"{_short(loser.provider)} lost: {loser.reason}, {escape(loser.detail)}")
