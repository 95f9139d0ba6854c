"""Whether gossip arrives, and how soon: real hosts of one process, as a star and as a mesh."""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import trio

from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p import open_libp2p_mesh
from pinaivu_node.mesh.mesh import Delivery, Mesh
from pinaivu_node.protocol.ids import PeerId, Topic

Shape = Literal["star", "mesh"]
PARTS: Final = ("star", "mesh")
SIZES: Final = (5, 20, 50)
MESSAGES: Final = 40
TOPIC: Final = Topic("/pinaivu/jobs/1/bench")
_LINKS: Final = 3
"""Earlier hosts that each host of a mesh dials."""
_PAYLOAD: Final = bytes(600)
"""A job offer has about so many bytes."""
_EVERY_S: Final = 0.05
_LATEST_S: Final = 10.0
"""What has not arrived by then is lost."""


@dataclass
class Heard:
    """What the hosts that stayed were to hear from each other, and what they heard."""

    expected: int = 0
    arrived: Counter[tuple[PeerId, bytes]] = field(default_factory=Counter)
    delays_s: list[float] = field(default_factory=list)
    complete: trio.Event = field(default_factory=trio.Event)

    def note(self, listener: PeerId, message: bytes, delay_s: float) -> None:
        """A host has it."""
        self.arrived[listener, message] += 1
        self.delays_s.append(delay_s)
        if len(self.arrived) >= self.expected:
            self.complete.set()

    @property
    def share(self) -> float:
        """Of the deliveries that should be."""
        return len(self.arrived) / self.expected

    @property
    def twice(self) -> int:
        """Deliveries that were none the first time."""
        return sum(self.arrived.values()) - len(self.arrived)


async def gossip(shape: Shape, hosts: int, *, messages: int, comers: int = 0) -> Heard:
    """Have every host publish by turns; `comers` more come and go meanwhile.

    Only deliveries among those who stay are counted: who comes and goes may miss what it will.
    """
    heard = Heard(expected=messages * (hosts - 1))
    sent: dict[bytes, float] = {}
    async with AsyncExitStack() as stack:
        crowd = await _crowd(stack, shape, hosts)
        nursery = await stack.enter_async_context(trio.open_nursery())
        staying = {mesh.peer_id for mesh in crowd}
        for mesh in crowd:
            inbox = await stack.enter_async_context(mesh.subscribe(TOPIC))
            nursery.start_soon(_listen, mesh.peer_id, inbox, staying, sent, heard)
        await _all_know_of_a_listener(crowd)
        for _ in range(comers):
            nursery.start_soon(_come_and_go, [mesh.addresses[0] for mesh in crowd[:_LINKS]])
        for number in range(messages):
            message = number.to_bytes(4) + _PAYLOAD
            sent[message] = trio.current_time()
            await crowd[number % hosts].publish(TOPIC, message)
            await trio.sleep(_EVERY_S)
        with trio.move_on_after(_LATEST_S):
            await heard.complete.wait()
        nursery.cancel_scope.cancel()
    return heard


async def _crowd(stack: AsyncExitStack, shape: Shape, hosts: int) -> list[Mesh]:
    choose = random.Random(1)  # noqa: S311 - the same crowd each time
    crowd: list[Mesh] = []
    for number in range(hosts):
        config = MeshConfig(hub=shape == "star" and number == 0)
        mesh = await stack.enter_async_context(open_libp2p_mesh(config, seed=os.urandom(32)))
        links = crowd[:1] if shape == "star" else choose.sample(crowd, min(_LINKS, len(crowd)))
        for neighbour in links:
            await mesh.dial(neighbour.addresses[0])
        crowd.append(mesh)
    return crowd


async def _all_know_of_a_listener(crowd: Sequence[Mesh]) -> None:
    """Greetings are exchanged within milliseconds of a connection; a heartbeat mends the rest."""
    await trio.sleep(0.5 + len(crowd) / 25)


async def _listen(
    me: PeerId,
    inbox: AsyncIterator[Delivery],
    staying: set[PeerId],
    sent: dict[bytes, float],
    heard: Heard,
) -> None:
    async for delivery in inbox:
        if delivery.publisher in staying:
            heard.note(me, delivery.payload, trio.current_time() - sent[delivery.payload])


async def _come_and_go(addresses: Sequence[str]) -> None:
    """A host that takes part for a second, leaves, and returns under its old name."""
    seed = os.urandom(32)
    while True:
        async with open_libp2p_mesh(MeshConfig(), seed=seed) as mesh:
            for address in addresses:
                await mesh.dial(address)
            async with mesh.subscribe(TOPIC):
                await mesh.publish(TOPIC, os.urandom(16))
                await trio.sleep(1)
        await trio.sleep(0.2)


def measure(*, only: str | None) -> dict[str, Any]:
    """Every figure of one run, with its target."""
    figures: dict[str, Any] = {"messages": MESSAGES, "targets": []}
    for shape in PARTS:
        if only not in (None, shape):
            continue
        for hosts in SIZES:
            for comers in (0, 3):
                name = f"{shape} of {hosts}" + (f", {comers} more coming and going" * bool(comers))
                print(f"bench: gossip in a {name} …", file=sys.stderr, flush=True)
                heard = trio.run(_measure, shape, hosts, comers)
                figures[name] = _figures(heard)
                figures["targets"].append(_row(name, heard))
    return figures


async def _measure(shape: Shape, hosts: int, comers: int) -> Heard:
    return await gossip(shape, hosts, messages=MESSAGES, comers=comers)


def _figures(heard: Heard) -> dict[str, float]:
    delays = sorted(1000 * delay for delay in heard.delays_s)
    return {
        "delivered": heard.share,
        "twice": heard.twice,
        "p50_ms": round(statistics.median(delays), 2),
        "p99_ms": round(delays[int(0.99 * len(delays))], 2),
    }


def _row(name: str, heard: Heard) -> dict[str, Any]:
    figures = _figures(heard)
    return {
        "figure": f"gossip in a {name}",
        "measured": f"{heard.share:.1%}, p50 {figures['p50_ms']:.1f} ms, "
        f"p99 {figures['p99_ms']:.1f} ms",
        "target": "100 %, once",
        "met": heard.share == 1 and not heard.twice,
    }
