"""What `scripts/demo` shows, step by step, to someone who sees the network for the first time."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

MODEL = "smollm2:135m"
QUESTION = "In one sentence: why is the sky blue?"
console = Console(highlight=False)


def main() -> int:
    """Run the demonstration; 0 if everything held."""
    arguments = _arguments()
    with contextlib.ExitStack() as stack:
        home = arguments.home or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pnv-"))
        )
        devnet = stack.enter_context(_devnet(home, arguments))
        console.rule("[bold]one question, streamed through the OpenAI SDK")
        request_id, answer = _ask(devnet)
        receipt = _get(devnet, f"/receipts/{request_id}?wait=10")
        bids = _get(devnet, f"/receipts/{request_id}/bids")
        console.rule("[bold]who bid, who won, what was paid")
        _show_auction(receipt["receipt"], bids)
        console.rule("[bold]the receipt, checked")
        verified = _verify(devnet, request_id, answer)
        if arguments.once or not verified:
            return 0 if verified else 1
        _invite(devnet)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit after the check")
    parser.add_argument("--home", type=Path, help="keep the network's state here")
    parser.add_argument(
        "--port", type=int, help="the gateway's port (default: 8080, or any free one with --once)"
    )
    parser.add_argument("--providers", type=int, default=2)
    return parser.parse_args()


@contextlib.contextmanager
def _devnet(home: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The network, from ready to stopped."""
    console.rule("[bold]a network of one coordinator, two providers and a gateway")
    port = arguments.port if arguments.port is not None else (0 if arguments.once else 8080)
    command = [
        sys.executable, "-m", "pinaivu_node.cli", "devnet", "--json", "--home", str(home),
        "--port", str(port), "--providers", str(arguments.providers), "--model", MODEL,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - PIPE was asked for
            line = process.stdout.readline()
            if not line:
                sys.exit("demo: the network did not come up; what it said is above")
            devnet = json.loads(line)
            console.print(f"ready: gateway at {devnet['base_url']}, logs in {devnet['home']}")
            yield devnet
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(KeyboardInterrupt):
                process.wait(timeout=30)


def _ask(devnet: dict[str, Any]) -> tuple[str, str]:
    """Print the answer as it comes; return the request id of its first chunk, and the text."""
    client = OpenAI(base_url=devnet["base_url"], api_key=devnet["api_key"])
    console.print(f"[bold]> {QUESTION}")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=80,
        temperature=0,
        stream=True,
    )
    request_id, text = "", ""
    for chunk in stream:
        request_id = request_id or str((chunk.model_extra or {}).get("request_id", ""))
        for choice in chunk.choices:
            text += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
    print()
    console.print(f"[dim]request_id {request_id}")
    return request_id, text


def _get(devnet: dict[str, Any], path: str) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        devnet["base_url"] + path, headers={"Authorization": f"Bearer {devnet['api_key']}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        body: dict[str, Any] = json.load(answer)
    return body


def _show_auction(receipt: dict[str, Any], bids: dict[str, Any]) -> None:
    table = Table(
        "provider", "answer", "input", "output", "", caption="prices in NanoX per million tokens"
    )
    for answer in bids["answers"]:
        prices = answer.get("prices")
        table.add_row(
            answer["bidder"][:8] + "…" + answer["bidder"][-6:],
            "bid" if prices else f"pass: {answer['reason']}",
            f"{prices['input']:,}" if prices else "",
            f"{prices['output']:,}" if prices else "",
            "[green]won[/]" if answer["bidder"] == receipt["provider"] else "",
        )
    console.print(table)
    for segment in receipt["segments"]:
        usage = segment["usage"]
        console.print(
            f"{usage['input'] + usage['cached_input']} prompt and {usage['output']} output tokens, "
            f"paid {segment['amount']:,} NanoX "
            f"(second price: {segment['uplift_ppm'] / 10_000:.1f} % over the winner's own list), "
            f"of which the network kept {receipt['fee']:,}"
        )


def _verify(devnet: dict[str, Any], request_id: str, answer: str) -> bool:
    text = Path(devnet["home"]) / "answer.txt"
    text.write_text(answer)
    coordinator = devnet["coordinator"].rsplit("/p2p/", 1)[1]
    done = subprocess.run(
        [
            sys.executable, "-m", "pinaivu_node.cli", "verify", request_id,
            "--gateway", devnet["base_url"], "--api-key", devnet["api_key"],
            "--coordinator", coordinator, "--answer", str(text),
        ],
        check=False,
    )  # fmt: skip
    return done.returncode == 0


def _invite(devnet: dict[str, Any]) -> None:
    console.rule("[bold]the network is running; Ctrl-C stops it")
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]})
    print(
        f"curl {devnet['base_url']}/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {devnet['api_key']}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d '{body}'"
    )
    print(f"\nkey: {devnet['api_key']}")


if __name__ == "__main__":
    sys.exit(main())
