"""Bytes that no honest peer sends, each with a name."""

from __future__ import annotations

import struct

import msgpack

HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "nil": b"\xc0",
    "never used byte": b"\xc1",
    "an integer": b"\x05",
    "a bare string": b"\xa3abc",
    "arrays nested 20,000 deep": b"\x91" * 20_000,
    "maps nested 20,000 deep": b"\x81\xa1a" * 20_000,
    "an array said to hold 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map said to hold 4 billion": b"\xdf\xff\xff\xff\xff",
    "a string said to hold 1 GiB": b"\xdb\x40\x00\x00\x00",
    "a blob said to hold 1 GiB": b"\xc6\x40\x00\x00\x00",
    "an extension": b"\xd4\x05\x00",
    "an extension of no bytes": b"\xc7\x00\x05",
    "an extension of no bytes as fields": b"\x92\xa8accept/1\xc7\x00\x05",
    "a timestamp of no bytes": b"\xc7\x00\xff",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x01",
    "trailing garbage": msgpack.packb(["accept/1", {"request_id": "req_" + "0" * 32}]) + b"x",
    "three elements": msgpack.packb(["accept/1", {}, 1]),
    "one element": msgpack.packb(["accept/1"]),
    "kind is a number": msgpack.packb([1, {}]),
    "kind is a list": msgpack.packb([["accept/1"], {}]),
    "kind is nested 1,000 deep": b"\x92" + b"\x91" * 1000 + b"\xc0\x80",
    "kind is a blob": msgpack.packb([b"accept/1", {}]),
    "kind is long": msgpack.packb(["k" * 100_000, {}]),
    "kind is unknown": msgpack.packb(["accept/2", {}]),
    "fields are a list": msgpack.packb(["accept/1", []]),
    "keys are numbers": msgpack.packb(["accept/1", {1: 2}]),
    "keys are blobs": msgpack.packb(["accept/1", {b"request_id": "x"}]),
    "a value nested 1,000 deep": (b"\x92\xa8accept/1\x81\xaarequest_id" + b"\x91" * 1000 + b"\xc0"),
    "a name twice": b"\x92\xa8accept/1\x82"
    + 2 * (msgpack.packb("request_id") + msgpack.packb("req_" + "0" * 32)),
    "a made-up name": msgpack.packb(
        ["accept/1", {"request_id": "req_" + "0" * 32, "\x1b[2J\n" * 10_000: 1}]
    ),
    "a lone surrogate": b"\x92\xa8accept/1\x81\xaarequest_id\xa3\xed\xa0\x80",
    "not UTF-8": b"\x92\xa8accept/1\x81\xaarequest_id\xa2\xff\xfe",
    "over the limit": b"\xc6" + struct.pack(">I", 1 << 20) + bytes(1 << 20),
}

# What to put in place of any field of any message: a wrong type, or a value out of bounds.
HOSTILE_VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    2**63,
    -(2**63),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\0" * 10,
    "x" * 70_000,
    "req_" + "٣" * 32,
    "12D3KooW" + "0OIl" * 10,
    b"",
    b"x" * 100_000,
    (),
    {},
    ((),) * 5000,
    {"": {}},
)

# What costs the most time and memory for its bytes.
MEGABYTES: dict[str, bytes] = {
    "wrong records": msgpack.packb(["tokens/1", {"deltas": [[]] * 130_000}]),
    "nearly records": msgpack.packb(["roster/1", {"entries": [{"a": 1}] * 130_000}]),
    "wrong numbers": msgpack.packb(["dispatch/1", {"resume_token_ids": [-1] * 130_000}]),
    "made-up names": msgpack.packb(
        ["accept/1", {f"{number:03}" + "k" * 4000: 1 for number in range(256)}]
    ),
    "empty arrays": b"\xdd" + struct.pack(">I", 1_000_000) + b"\x90" * 1_000_000,
    "empty maps": b"\x98" + 8 * (struct.pack(">BI", 0xDD, 131_000) + b"\x80" * 131_000),
    "little maps": b"\x93" + 3 * (struct.pack(">BI", 0xDD, 116_000) + b"\x81\xa0\xc0" * 116_000),
    "little lists": b"\x94" + 4 * (struct.pack(">BI", 0xDD, 131_000) + b"\x91\xc0" * 131_000),
}
