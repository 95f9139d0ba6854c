"""Many streams on one connection, as `/yamux/1.0.0` spells them.  Pure: bytes in, events out.

    frames       the header and its numbers                 (spec: Framing)
    states       what a stream may do next, as a table      (spec: Stream opening, closing)
    windows      how much a peer may send us, and when more (spec: Flow control)
    events       what the owner of a connection is told
    stream       one stream: bytes to go out, bytes that came in
    connection   all of them: the parser, fairness, ping, go away, limits

Nothing here reads a clock, touches a socket or waits.  The owner hands in what arrived and the
time, takes out bytes to send and events to act on, and may do so in any order.

Where the specification leaves room, or peers are known to use it, we do this:

* *Opening.*  The dialler opens odd streams, the listener even ones; 0 is the session's own number.
  A SYN of the wrong parity, or for a stream that is open, breaks the protocol.  Numbers need not
  grow: Go's implementation takes its number before it sends.  Data may follow a SYN at once; at
  most `Limits.open_backlog` streams of ours wait for their ACK.  One stream more than
  `Limits.inbound_streams` is refused with RST; a peer that goes on regardless breaks the protocol.
* *Closing.*  FIN ends one direction.  A stream on which both have said it is gone.  RST ends both
  at once, and is told apart from FIN: bytes that had arrived can still be read, and then the
  stream says that it was reset.  Data after FIN breaks the protocol.  Frames for a stream that is
  gone are skipped, as they may have crossed our RST; for one that never was they break it.
* *Flow control.*  Every stream starts with 256 KiB each way.  A peer that sends more than its
  window breaks the protocol before a byte beyond it is kept.  We give back what was read when it
  is half of the window, and a larger window when the peer filled half of it within four round
  trips, as long as all windows of a connection together stay within `Limits.window_budget`.
  An update that would lift a window above 2³²−1 breaks the protocol.
* *Keep alive.*  We answer pings, and measure the round trip by ours.  A peer that makes us queue
  more replies than it reads breaks the protocol.
* *Go away.*  After GOAWAY from either side no stream is opened; those that are open go on.
"""
