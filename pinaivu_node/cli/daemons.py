"""Commands that run a daemon."""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import trio
import typer

from pinaivu_node import config
from pinaivu_node.cli import (
    Home,
    Json,
    ModelsFolder,
    app,
    errors,
    print_json,
    screen,
)
from pinaivu_node.config import DATA_FOLDER, CoordinatorSettings, ProviderSettings
from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.interpreter import tune_for_start
from pinaivu_node.logs import setup_logging
from pinaivu_node.models.catalogue import CATALOGUE
from pinaivu_node.protocol.ids import ModelName

if TYPE_CHECKING:
    from pinaivu_node.devnet import Devnet, DevnetPlan

Flag = Annotated[str | None, typer.Option(show_default=False)]
Coordinators = Annotated[
    list[str] | None,
    typer.Option(
        help="The coordinator's multiaddr; repeat for its other addresses, or for others to turn "
        "to when it cannot be reached.",
        show_default=False,
    ),
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        help="Multiaddr to listen on; /ws or /wss behind it for WebSockets.", show_default=False
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(help="Multiaddr to tell others, behind a NAT or a proxy.", show_default=False),
]
TlsCert = Annotated[
    Path | None, typer.Option(help="PEM file, to listen on /wss.", show_default=False)
]
Lan = Annotated[
    bool | None,
    typer.Option(
        "--lan/--no-lan",
        help="By mDNS: a coordinator advertises, a provider that is told of none looks for one.",
        show_default=False,
    ),
]
Relay = Annotated[
    bool | None,
    typer.Option(
        "--relay/--no-relay",
        help="Pass on bytes between peers that cannot dial each other; coordinators do.",
        show_default=False,
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option(help="PEM file, if the key is not beside it.", show_default=False)
]


@app.command(
    epilog="Example: `pinaivu-node start --model smollm2:135m "
    "--coordinator /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW…`"
)
def start(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Catalogue name or folder; repeat for more. The first that fit are kept loaded, "
            "the others are loaded on demand.",
            show_default=False,
        ),
    ] = None,
    coordinator: Coordinators = None,
    listen: Listen = None,
    announce: Announce = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    lan: Lan = None,
    relay: Relay = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            help="HTTP proxy to reach /ws and /wss addresses through, like "
            "http://proxy.example.org:3128.",
            show_default=False,
        ),
    ] = None,
    relay_through: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr of a relay besides the coordinator.", show_default=False),
    ] = None,
    price_input: Annotated[
        int | None, typer.Option(help="NanoX per million prompt tokens.", show_default=False)
    ] = None,
    price_cached_input: Annotated[
        int | None, typer.Option(help="The same for warm ones.", show_default=False)
    ] = None,
    price_output: Annotated[
        int | None, typer.Option(help="NanoX per million output tokens.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or float16; auto: bfloat16 on CUDA, float32 on a CPU.",
            show_default=False,
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="GPUs of this machine that share each model.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="torch runs the model here; openai sells a server at --engine-url.",
            show_default=False,
        ),
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(help="For example http://127.0.0.1:8000/v1.", show_default=False),
    ] = None,
    engine_model: Annotated[
        str | None,
        typer.Option(help="What that server calls the model.", show_default=False),
    ] = None,
    context_window: Annotated[
        int | None, typer.Option(help="What that server was started with.", show_default=False)
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="int8 runs models in eight bits, in a quarter of the memory; they are sold under "
            "names that say so, such as smollm2:135m-int8.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine.", show_default=False)
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            help="Answers at once; default: 16 on a CPU, 64 on a GPU.", show_default=False
        ),
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(help="Memory for keys and values of each model.", show_default=False),
    ] = None,
    memory_fraction: Annotated[
        float | None,
        typer.Option(help="Of a GPU's memory, for all; default: 0.9.", show_default=False),
    ] = None,
    speculate: Annotated[
        int | None,
        typer.Option(
            help="Tokens guessed per step from what was said before; default: 8 on a CPU.",
            show_default=False,
        ),
    ] = None,
    memory_budget_gb: Annotated[
        float | None,
        typer.Option(
            help="What several models may take together; default: 80 % of the memory.",
            show_default=False,
        ),
    ] = None,
    home: Home = None,
    models_folder: ModelsFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Serve models to the network and earn for it."""
    settings = config.load(ProviderSettings, _flags(locals()), os.environ)
    setup_logging(json=as_json)
    tune_for_start()
    from pinaivu_node.daemon import fetch_models, run_provider

    fetch_models(settings, console=errors)
    trio.run(partial(run_provider, settings, live=screen.is_terminal and not as_json))


@app.command(epilog="Example: `pinaivu-node coordinate --listen /ip4/0.0.0.0/tcp/4001`")
def coordinate(
    *,
    listen: Listen = None,
    announce: Announce = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    lan: Lan = None,
    relay: Relay = None,
    database: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL; default: SQLite in the home.", show_default=False),
    ] = None,
    welcome_credit: Annotated[
        int | None,
        typer.Option(help="NanoX granted once to each new gateway.", show_default=False),
    ] = None,
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Hold auctions, keep the ledger, write the receipts."""
    settings = config.load(CoordinatorSettings, _flags(locals()), os.environ)
    setup_logging(json=as_json)
    tune_for_start()
    from pinaivu_node.daemon import run_coordinator

    trio.run(run_coordinator, settings)


@app.command(epilog="Example: `pinaivu-node devnet --providers 3 --port 0 --json`")
def devnet(
    *,
    providers: Annotated[int, typer.Option(min=1, max=16)] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8080,
    model: Annotated[list[str] | None, typer.Option(show_default="smollm2:135m")] = None,
    engine: Annotated[str, typer.Option(help="torch, or openai with --engine-url.")] = "torch",
    engine_url: Flag = None,
    home: Annotated[
        Path, typer.Option(help="All state of the network; kept between runs.")
    ] = DATA_FOLDER / "devnet",
    models_folder: ModelsFolder = None,
    as_json: Json = False,
) -> None:
    """A whole network on this machine: one coordinator, a gateway, providers."""
    from pinaivu_node.devnet import DevnetPlan
    from pinaivu_node.models.pull import pull_missing

    plan = DevnetPlan(
        home=home.absolute(),
        models_folder=models_folder or DATA_FOLDER / "models",
        models=tuple(model or ("smollm2:135m",)),
        providers=providers,
        port=port,
        engine=engine,
        engine_url=engine_url,
    )
    if engine == "torch":
        pull_missing(plan.models_folder, plan.models, console=errors)
    trio.run(partial(_run_devnet, plan, as_json=as_json))


async def _run_devnet(plan: DevnetPlan, *, as_json: bool) -> None:
    from pinaivu_node.devnet import open_devnet, stop_signals, watch

    with trio.open_signal_receiver(*stop_signals()) as signals:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                async with open_devnet(plan) as network:
                    if as_json:
                        print_json(network.as_json())
                    else:
                        _show_devnet(network, model=plan.models[0])
                    async for name, pid in watch(network):
                        errors.print(
                            f"[yellow]{name} (pid {pid}) ended;[/] start it again with\n  "
                            + shlex.join(network.commands[name]),
                            soft_wrap=True,
                        )
                    await trio.sleep_forever()

            nursery.start_soon(serve)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    errors.print("devnet: stopped")


def _show_devnet(network: Devnet, *, model: str) -> None:
    chats = model not in CATALOGUE or CATALOGUE[ModelName(model)].chat
    path, prompt = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]')
        if chats
        else ("completions", '"prompt": "Once upon a time"')
    )
    screen.print(f"[bold]gateway[/]      {network.base_url}")
    screen.print(f"[bold]key[/]          {network.api_key}")
    screen.print(f"[bold]coordinator[/]  {network.coordinator}", soft_wrap=True)
    screen.print(f"[bold]state[/]        {network.home}\n")
    screen.print(
        f"curl {network.base_url}/{path} \\\n"
        f"  -H 'Authorization: Bearer {network.api_key}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{{\"model\": \"{model}\", {prompt}}}'\n",
        soft_wrap=True,
        markup=False,
    )
    screen.print("[dim]Ctrl-C stops it.")


@app.command()
def identity(
    *,
    home: Annotated[Path, typer.Option(help="Whose key.")] = DATA_FOLDER / "provider",
    as_json: Json = False,
) -> None:
    """Print this peer's PeerID, making its key if there is none."""
    from pinaivu_node.protocol.signing import Signer

    peer = Signer(load_or_create_seed(home)).peer_id
    if as_json:
        print_json({"peer_id": peer, "key_file": str(home / "identity.key")})
    else:
        print(peer)  # noqa: T201


def _flags(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("as_json", "config")}
