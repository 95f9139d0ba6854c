"""The composition root: one nursery, one mesh, the roles of this peer."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Final

import trio
from rich.console import Console

from pinaivu_node import control
from pinaivu_node.config import CoordinatorSettings, ProviderSettings
from pinaivu_node.coordinator.config import CoordinatorConfig
from pinaivu_node.coordinator.service import Coordinator, serve_coordinator
from pinaivu_node.coordinator.store import open_store, sqlite_url
from pinaivu_node.desk import coordinator_handlers, provider_handlers
from pinaivu_node.engine.client import ProcessEngine, open_engine
from pinaivu_node.engine.config import EngineConfig, OpenAIEngineConfig
from pinaivu_node.engine.fleet.berth import FleetModel
from pinaivu_node.engine.fleet.fleet import FleetConfig, open_fleet
from pinaivu_node.engine.fleet.footprint import default_budget, footprint_of, resident_bytes
from pinaivu_node.engine.model.weights import LoadError, check_files
from pinaivu_node.engine.openai.engine import open_openai_engine
from pinaivu_node.engine.synthetic import SyntheticEngine
from pinaivu_node.engine.types import Engine
from pinaivu_node.identity import load_or_create_seed
from pinaivu_node.interpreter import tune_for_latency
from pinaivu_node.mesh.bootstrap import by_peer, join_coordinator, named_or_found, relays_of
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import PeerUnreachable
from pinaivu_node.mesh.pipes import RelayLimits
from pinaivu_node.models.catalogue import CATALOGUE, ModelKind
from pinaivu_node.models.pull import pull_missing
from pinaivu_node.models.store import InstalledModel, ModelStore
from pinaivu_node.models.variants import resolve_variant
from pinaivu_node.protocol.ids import (
    ModelName,
    NanoX,
    UnixMilliseconds,
    digest_of,
    is_model_name,
)
from pinaivu_node.protocol.market import JobKind
from pinaivu_node.protocol.money import PriceList
from pinaivu_node.protocol.signing import Signer
from pinaivu_node.provider.config import ProviderConfig
from pinaivu_node.provider.service import Provider, serve_provider
from pinaivu_node.provider.shelf import ServedModel

logger = logging.getLogger(__name__)

_KV_CACHE_GB: Final = 2.0
"""Of each of several models, where nobody can say how much memory there is."""


class DaemonError(Exception):
    """The daemon cannot start; the message says what to do."""


def unix_clock() -> UnixMilliseconds:
    """Now, in milliseconds since the epoch."""
    return UnixMilliseconds(time.time_ns() // 1_000_000)


# --- provider -------------------------------------------------------------------------------------


def fetch_models(settings: ProviderSettings, *, console: Console) -> None:
    """Pull what `start` needs and is not here; blocks, with bars.

    The cheap check comes first: nobody fetches a gigabyte to learn of a missing flag.
    """
    _check_coordinators(settings)
    if settings.engine == "torch":
        pull_missing(settings.models_folder, settings.model, console=console)


async def run_provider(settings: ProviderSettings, *, live: bool) -> None:
    """Sell the configured models until SIGINT or SIGTERM; `live` shows the screen."""
    _check_coordinators(settings)
    coordinators = settings.coordinator or await _look_around()
    if not coordinators:
        return  # stopped before one was found
    seed = load_or_create_seed(settings.home)
    async with AsyncExitStack() as stack:
        models = await _open_models(stack, settings)
        engines = {served.model: served for served in models}
        config = _mesh_config(settings).model_copy(
            update={
                "relays": relays_of(coordinators, settings.relay_through),
                "proxy": settings.proxy.get_secret_value() if settings.proxy else None,
            }
        )
        mesh = await stack.enter_async_context(open_libp2p_mesh(config, seed=seed))
        nursery = await stack.enter_async_context(_until_stopped())
        coordinator = await join_coordinator(mesh, coordinators)
        provider: Provider = await nursery.start(
            partial(
                serve_provider,
                mesh,
                Signer(seed),
                coordinator,
                None,
                engines,
                ProviderConfig(proofs_folder=settings.home / "proofs" / coordinator),
                clock=unix_clock,
            )
        )
        handlers = provider_handlers(provider, mesh, coordinator)
        await nursery.start(control.serve_control, control.socket_path(settings.home), handlers)
        logger.info("provider %s sells %s", mesh.peer_id, ", ".join(engines))
        tune_for_latency()
        if live:
            from pinaivu_node import screen

            nursery.start_soon(screen.show, provider.statistics)
        await trio.sleep_forever()


def _check_coordinators(settings: ProviderSettings) -> None:
    try:
        if by_peer(settings.coordinator) or settings.lan:
            return
        fault = "which coordinator?"
    except PeerUnreachable as exc:
        fault = f"which coordinator? {exc}."
    raise DaemonError(
        f"{fault} Give --coordinator /ip4/…/tcp/4001/p2p/12D3KooW…, or set `coordinator` in "
        f"{settings.home / 'config.toml'}"
    )


async def _look_around() -> tuple[str, ...]:
    """Addresses of a coordinator on the local network; none if we are stopped before."""
    found: tuple[str, ...] = ()
    async with _until_stopped() as nursery:
        found = await named_or_found((), lan=True)
        nursery.cancel_scope.cancel()
    return found


async def _open_models(stack: AsyncExitStack, settings: ProviderSettings) -> list[ServedModel]:
    """What is to be sold, each model once, its engine running or about to be loaded."""
    names = tuple(dict.fromkeys(settings.model))
    match settings.engine:
        case "torch":
            store = ModelStore(settings.models_folder)
            int8 = settings.quantization is not None
            found = [resolve_variant(store, name, int8=int8) for name in names]
            models = {model.name: model for model in found}
            return await _open_own(stack, settings, list(models.values()))
        case "openai":
            return [await _open_server(stack, settings, name) for name in names]
        case "bench":
            return [_bench(settings, name) for name in names]


async def _open_own(
    stack: AsyncExitStack, settings: ProviderSettings, models: Sequence[InstalledModel]
) -> list[ServedModel]:
    _check_one(models)
    if len(models) > 1:
        return await _open_fleet(stack, settings, models)
    engine = await stack.enter_async_context(open_engine(_engine_config(models[0], settings)))
    return [_served(models[0], engine, settings)]


def _check_one(models: Sequence[InstalledModel]) -> None:
    """DaemonError unless one of the models at least is whole; takes milliseconds for each."""
    reasons = []
    for model in models:
        try:
            check_files(model.folder)
        except LoadError as exc:
            reasons.append(f"{model.name} cannot be served: {exc}")
    if len(reasons) == len(models):
        raise DaemonError("; ".join(reasons))


async def _open_fleet(
    stack: AsyncExitStack, settings: ProviderSettings, models: Sequence[InstalledModel]
) -> list[ServedModel]:
    """Several models of our own, which share the memory of this machine or of its GPU."""
    given = settings.memory_budget_gb
    budget = default_budget(settings.device) if given is None else round(given * 1e9)
    # Each is given its cache, where a single model would take what it finds: a tenth of what there
    # is, so that half of it is left for weights when five models are in memory.
    kv_cache_gb = _KV_CACHE_GB if budget is None else budget / 10 / 2**30
    fleet = await stack.enter_async_context(
        open_fleet(
            [_fleet_model(_engine_config(model, settings, kv_cache_gb), model) for model in models],
            FleetConfig(budget=budget),
            memory_of=_memory_of,
        )
    )
    served = []
    for model in models:
        engine = fleet.engines[model.name]
        served.append(replace(_served(model, engine, settings), on_demand=engine))
    return served


def _fleet_model(config: EngineConfig, model: InstalledModel) -> FleetModel:
    footprint = footprint_of(config)
    return FleetModel(
        name=model.name,
        open=partial(open_engine, config),
        need=footprint.need,
        spare=footprint.spare,
        load_s=footprint.load_s,
        context_window=model.context_window,
    )


def _engine_config(
    model: InstalledModel, settings: ProviderSettings, kv_cache_gb: float | None = None
) -> EngineConfig:
    return EngineConfig(
        model=model.folder,
        device=settings.device,
        dtype=settings.dtype,
        quantization=model.quantization,
        tensor_parallel=settings.tensor_parallel,
        threads=settings.threads,
        max_running=settings.max_running,
        kv_cache_gb=settings.kv_cache_gb or kv_cache_gb,
        memory_fraction=settings.memory_fraction,
        speculate=settings.speculate,
    )


def _memory_of(engine: Engine) -> int | None:
    """What an engine's process takes; of the memory of a GPU the process table knows nothing."""
    if not isinstance(engine, ProcessEngine) or engine.statistics().device != "cpu":
        return None
    return None if engine.pid is None else resident_bytes(engine.pid)


def _served(model: InstalledModel, engine: Engine, settings: ProviderSettings) -> ServedModel:
    return ServedModel(
        engine=engine,
        model=model.name,
        digest=model.digest,
        prices=_prices(settings),
        kinds=_kinds(chat=model.chat, kind=model.kind),
        licence=model.licence.name,
        owner=model.owner,
    )


def _bench(settings: ProviderSettings, name: str) -> ServedModel:
    return ServedModel(
        engine=SyntheticEngine(tokens_per_second=400, ttft_ms=5, capacity=1024),
        model=_model_name(name),
        digest=digest_of(b"pinaivu/bench/1"),
        prices=_prices(settings),
        licence="none: not a model",
    )


async def _open_server(stack: AsyncExitStack, settings: ProviderSettings, name: str) -> ServedModel:
    if settings.engine_url is None:
        raise DaemonError("--engine openai needs --engine-url, such as http://127.0.0.1:8000/v1")
    entry = CATALOGUE.get(ModelName(name))
    config = OpenAIEngineConfig(
        base_url=settings.engine_url,
        model=settings.engine_model or name,
        api_key=settings.engine_api_key,
        context_window=settings.context_window or (entry.context_window if entry else 4096),
    )
    # What the server behind the URL has loaded is not ours to hash: unless the catalogue pins the
    # weights of that name, the digest is of the name alone, and says so by being different.
    pinned = entry.digest if entry else None
    return ServedModel(
        engine=await stack.enter_async_context(open_openai_engine(config)),
        model=_model_name(name),
        digest=pinned or digest_of(b"pinaivu/unpinned-model/1\0" + name.encode()),
        prices=_prices(settings),
        kinds=_kinds(
            chat=entry.chat if entry else True, kind=entry.kind if entry else ModelKind.TEXT
        ),
        licence=entry.licence.name if entry else "",
        owner=entry.owner if entry else "",
    )


def _model_name(name: str) -> ModelName:
    if not is_model_name(name):
        raise DaemonError(f"{name!r} cannot be a model's name: write it like llama3.2:1b")
    return ModelName(name)


def _kinds(*, chat: bool, kind: ModelKind) -> tuple[JobKind, ...]:
    if kind is ModelKind.EMBEDDING:
        return (JobKind.EMBEDDING,)
    return (JobKind.CHAT, JobKind.COMPLETION) if chat else (JobKind.COMPLETION,)


def _prices(settings: ProviderSettings) -> PriceList:
    cached = settings.price_cached_input
    return PriceList(
        input=NanoX(settings.price_input),
        cached_input=NanoX(settings.price_input // 4 if cached is None else cached),
        output=NanoX(settings.price_output),
    )


# --- coordinator ----------------------------------------------------------------------------------


async def run_coordinator(settings: CoordinatorSettings) -> None:
    """Coordinate until SIGINT or SIGTERM."""
    seed = load_or_create_seed(settings.home)
    database = settings.database or sqlite_url(settings.home / "coordinator.db")
    config = CoordinatorConfig(welcome_credit=settings.welcome_credit)
    async with (
        open_store(database) as store,
        open_libp2p_mesh(_mesh_config(settings, hub=True), seed=seed) as mesh,
        AsyncExitStack() as stack,
        _until_stopped() as nursery,
    ):
        coordinator: Coordinator = await nursery.start(
            partial(serve_coordinator, mesh, store, Signer(seed), config, clock=unix_clock)
        )
        handlers = coordinator_handlers(coordinator, mesh)
        await nursery.start(control.serve_control, control.socket_path(settings.home), handlers)
        if settings.lan:
            from pinaivu_node.mesh.lan import advertised

            await stack.enter_async_context(advertised(mesh.peer_id, mesh.addresses))
        tune_for_latency()
        for address in mesh.addresses:
            logger.info("coordinator listens on %s", address)
        await trio.sleep_forever()


# --- both -----------------------------------------------------------------------------------------


def _mesh_config(
    settings: ProviderSettings | CoordinatorSettings, *, hub: bool = False
) -> MeshConfig:
    return MeshConfig(
        listen=settings.listen,
        announce=settings.announce,
        tls_certificate=settings.tls_cert,
        tls_key=settings.tls_key,
        relay=RelayLimits() if settings.relay else None,
        hub=hub,
    )


@contextlib.asynccontextmanager
async def _until_stopped() -> AsyncIterator[trio.Nursery]:
    """A nursery that the first SIGINT or SIGTERM cancels; the rest of the stack then unwinds."""
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

            async def stop() -> None:
                async for number in signals:
                    logger.info("stopping on %s", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            yield nursery
