"""Gossipsub of py-libp2p, made to survive hostile messages and to forget nobody.

See the package for what is changed and why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub

from pinaivu_node.mesh.conduct import Offence
from pinaivu_node.mesh.config import MeshConfig
from pinaivu_node.mesh.libp2p.corked import Buffered
from pinaivu_node.mesh.libp2p.muxer import Fault
from pinaivu_node.mesh.libp2p.secure import PeerGate
from pinaivu_node.mesh.mesh import MAX_FRAME_BYTES
from pinaivu_node.protocol.ids import PeerId

logger = logging.getLogger(__name__)

GOSSIP_PROTOCOL: Final = TProtocol("/meshsub/1.1.0")
"""1.2 announces every message to every neighbour before sending it: twice the work for 1 KiB."""
_MAX_RPC_BYTES: Final = MAX_FRAME_BYTES + (64 << 10)
"""A gossip RPC carries the payload, its signature and the control messages beside it."""
_MAX_TOPIC_CHARACTERS: Final = 256
"""Ours are a prefix and a model's name.  Those of strangers are remembered."""


class SafePubsub(Pubsub):  # type: ignore[misc] # untyped base
    """Pubsub that no message can bring down, and that delivers without a queue of its own."""

    deliver: Callable[[Any], None]
    admits: PeerGate
    fault: Fault
    restart: Callable[[PeerId], None]

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Check, deliver and forward one message; never raises for what is in it."""
        local = msg_forwarder == self.my_id
        if not local and not self.admits(PeerId(str(msg_forwarder))):
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:  # whatever a message can cause, in protobuf, keys or the router
            if local:
                raise
            self.fault(
                PeerId(str(msg_forwarder)),
                f"a gossip message that breaks us: {exc!r}",
                Offence.PROTOCOL,
            )

    async def continuously_read_stream(self, stream: Any) -> None:
        """Take in what one peer says until its stream ends."""
        await super().continuously_read_stream(Buffered(stream))

    async def handle_sending_messages(self, peer_id: Any, stream: Any, queue: Any) -> None:
        """Write to one peer until that fails; the reader of its stream learns it too."""
        queue.max_message_size = _MAX_RPC_BYTES  # above it a message is dropped without a word
        try:
            # A topic subscribed to while the first greeting was being written is in neither the
            # greeting nor the queue.  Saying all again costs a hundred bytes.
            await self.write_msg(stream, self.get_hello_packet())
            await super().handle_sending_messages(peer_id, stream, queue)
        except Exception:
            logger.debug("gossip to a peer ended", exc_info=True)

    def _handle_dead_peer(self, peer_id: Any) -> None:
        """Forget a peer; and if it is connected still, begin anew with it.

        Its subscriptions are forgotten whichever of its streams or connections died, and it has no
        reason to announce them again: it would never hear from us.  So it goes when the old self of
        a restarted peer is found dead, or when a peer was too slow once.
        """
        super()._handle_dead_peer(peer_id)
        if self._peer_is_connected(peer_id):
            self.restart(PeerId(str(peer_id)))

    def handle_subscription(self, origin_id: Any, sub_message: Any) -> None:
        """Note what a peer listens to, if it can be a topic at all; the base bounds how many."""
        if len(sub_message.topicid) <= _MAX_TOPIC_CHARACTERS:
            super().handle_subscription(origin_id, sub_message)

    def notify_subscriptions(self, publish_message: Any) -> None:
        """Deliver straight to our inboxes: the stock queue holds 32 and drops the newest."""
        self.deliver(publish_message)


class Router(GossipSub):  # type: ignore[misc] # untyped base
    """Gossipsub that loses nothing in a star.

    Stock, each peer sends to the half dozen neighbours of its gossip mesh and trusts them to pass
    it on, and whoever has more neighbours prunes them down to that: where all know one hub and
    nobody else, most are left out for a minute at a time.  So what a peer publishes itself goes to
    every neighbour that listens (gossipsub v1.1, flood publishing), and a hub treats what it passes
    on alike: its degree is the number of its neighbours.
    """

    hub = False

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        """Who is sent a message, which came from `msg_forwarder` and was made by `origin`."""
        if not self.hub and msg_forwarder != self.pubsub.my_id:
            chosen: Iterable[ID] = super()._get_peers_to_send(
                topic_ids, msg_forwarder, origin, msg_id
            )
            return chosen
        listeners = self.pubsub.peer_topics
        peers: set[ID] = set().union(*(listeners.get(topic, ()) for topic in topic_ids))
        return peers - {msg_forwarder, origin}


def make_pubsub(host: Any, config: MeshConfig) -> tuple[SafePubsub, Any]:
    """Pubsub and its router, to be run beside the host."""
    low, degree, high = 4, 6, 12
    router = Router(
        [GOSSIP_PROTOCOL],
        degree=degree,
        degree_low=low,
        degree_high=config.max_connections if config.hub else high,  # a hub sends nobody away
        heartbeat_initial_delay=0.1,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,  # its "health" lengthens the heartbeat to a minute
        spam_protection_enabled=False,  # drops above 10 messages a second, ours included
        eclipse_protection_enabled=False,  # wants neighbours of many IP networks
    )
    router.hub = config.hub
    pubsub = SafePubsub(host, router, strict_signing=True, max_inbound_rpc_size=_MAX_RPC_BYTES)
    pubsub.counter = time.time_ns()
    return pubsub, router


def publisher_of(message: Any) -> PeerId:
    """Who signed this gossip message."""
    return PeerId(str(ID(message.from_id)))
