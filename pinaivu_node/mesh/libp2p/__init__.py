"""The Mesh on real sockets.  This package is the sole importer of libp2p.

    channel       the socket
    websocket     another, for those who get out through HTTP ports only
    proxy         and for those who get out through an HTTP proxy only
    secure        Noise: their handshake, then our session (`mesh.noise`)
    muxer         our Yamux (`mesh.yamux`) on trio, in the shape that libp2p wants
    muxed_stream  one stream of it
    flusher       sends once per turn of the event loop what was written in it
    pulse         notices silent peers
    pressure      bounds what all peers together make us hold
    transport     what a host is given of all that
    gossip        pubsub that no message can bring down
    host          a py-libp2p host that is safe to expose
    circuit       connections through a relay
    stream        frames on one libp2p stream
    mesh          the Mesh itself

py-libp2p 0.8.1 speaks the protocols well and takes care of nothing else.  What is changed, and
why, in the order of a connection's life; `channel`, `secure`, `muxer`, `gossip` and `host` touch
every private attribute that we touch, and `tests/mesh/test_libp2p_internals.py` fails when an
upgrade moves one:

* Security is Noise and nothing else: by default a peer may choose plaintext, which proves no key.
* The Noise session and the muxer are our own.  The stock ones lose the connection when a read or a
  write is cancelled, let a peer fill our memory, never drop one that hangs, take a reset for an
  end, and send a window update for every byte of a handshake: twenty times the work.
* The inbound limiter counts connections of the past and refuses all after 250 of them, and parks a
  task for each.  Our `_InboundGate` replaces the whole handler: it bounds handshakes, not history.
* A dial waits 250 ms for a second address even when there is none.
* The auto-connector dials whoever was ever heard of, and a watermark of 0 does not stop it.
* The resource manager's limits, breakers and "graceful degradation" act on their own account; we
  take it away and count for ourselves.
* An exception in a handler ends the process or leaves a connection that accepts no more streams.
* Gossip in a star reaches a third of it: whoever has many neighbours prunes them.  See `Router`.
* A gossip message with garbage in it ends the process.
* Gossip forgets what a live peer subscribed to, in the two cases told of in `SafePubsub`.
* Gossip sequence numbers start at the time in seconds: a publisher that restarts repeats them, and
  its messages are dropped as old.
"""

import warnings

with warnings.catch_warnings():
    # Generated protobuf code and multicodec tables warn as they are imported; nothing of ours.
    warnings.simplefilter("ignore")
    import libp2p  # noqa: F401 - what is imported now is not imported later, and warns no more

from pinaivu_node.mesh.libp2p.mesh import open_libp2p_mesh

__all__ = ["open_libp2p_mesh"]
