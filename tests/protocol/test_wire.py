"""Every message has golden bytes, and no bytes get past the door except as what they are."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pkgutil
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from corpus import HOSTILE, HOSTILE_VALUES, MEGABYTES
from hypothesis import example, given
from hypothesis import strategies as st
from samples import SAMPLES

from pinaivu_node import protocol
from pinaivu_node.protocol import inference, market, receipt
from pinaivu_node.protocol.errors import LocalProtocolError, RemoteProtocolError
from pinaivu_node.protocol.wire import (
    Message,
    decode_untrusted,
    encode,
    encode_body,
)

GOLDEN = Path(__file__).with_name("golden.json")


def all_messages() -> list[type[Message]]:
    """Every message that any module of the protocol defines."""
    names = [
        each.name for each in pkgutil.iter_modules(protocol.__path__, "pinaivu_node.protocol.")
    ]
    return [
        value
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and issubclass(value, Message) and value.__module__ == name
        if value is not Message
    ]


KINDS = {message.kind: message for message in all_messages()}
EVERYTHING = tuple(KINDS.values())
DOORS = (
    market.TO_COORDINATOR, market.TO_PEER, inference.TO_PROVIDER, inference.TO_GATEWAY,
    receipt.TO_LOG, receipt.FROM_LOG,
)  # fmt: skip
by_kind = pytest.mark.parametrize("message", SAMPLES, ids=lambda each: each.kind)


def test_no_two_messages_have_one_name() -> None:
    assert len(all_messages()) == len(KINDS)


def test_every_kind_has_a_sample() -> None:
    assert sorted(sample.kind for sample in SAMPLES) == sorted(KINDS)


@by_kind
def test_the_bytes_of_a_message_never_change(message: Message) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert encode(message).hex() == golden[message.kind]


@by_kind
def test_golden_bytes_decode_to_the_message(message: Message) -> None:
    data = bytes.fromhex(json.loads(GOLDEN.read_text())[message.kind])
    assert decode_untrusted(data, *EVERYTHING) == message
    assert type(message).from_body_untrusted(encode_body(message)) == message


def test_no_golden_bytes_are_left_of_a_message_that_is_gone() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == sorted(KINDS)


@pytest.mark.parametrize("expected", DOORS, ids=lambda kinds: kinds[0].kind)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_in_one_short_line(
    name: str, expected: tuple[type[Message], ...]
) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_untrusted(HOSTILE[name], *expected)
    assert_short_line(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_in_one_short_line(name: str) -> None:
    for kind in EVERYTHING:
        with pytest.raises(RemoteProtocolError) as caught:
            kind.from_body_untrusted(HOSTILE[name])
        assert_short_line(caught.value)


def assert_short_line(error: RemoteProtocolError) -> None:
    """An operator reads it in a log: a stranger must not write there at length or in control."""
    assert len(str(error)) <= 300
    assert str(error).isprintable()


def paths_into(value: object, prefix: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where every value inside nested maps and lists is."""
    found = []
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list)
        else ()
    )  # fmt: skip
    for key, inner in items:
        found += [(*prefix, key), *paths_into(inner, (*prefix, key))]
    return found


def replaced(value: object, path: tuple[object, ...], by: object) -> object:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], by)
    return copy


@by_kind
def test_a_hostile_value_in_any_field_is_refused_or_means_itself(message: Message) -> None:
    fields = msgpack.unpackb(encode_body(message))
    for path in paths_into(fields):
        for value in HOSTILE_VALUES:
            try:
                data = msgpack.packb([message.kind, replaced(fields, path, value)])
                decoded = decode_untrusted(data, type(message))
            except (RemoteProtocolError, OverflowError):
                continue
            # What was let in must be sayable: no value may break us when we pass it on.
            assert decode_untrusted(encode(decoded), type(message)) == decoded


def of_another_type(value: object) -> Iterator[object]:
    """The same value as other types would say it; no integer for a float, which means itself."""
    match value:
        case bool():
            yield int(value)
        case int():
            yield from (float(value), str(value), bool(value))
        case float():
            yield str(value)
        case str():
            yield value.encode()
        case bytes():
            yield value.decode("latin-1")
        case list():
            yield dict(enumerate(map(str, value)))
        case dict():
            yield list(value.items())


@by_kind
def test_no_type_passes_for_another(message: Message) -> None:
    fields = msgpack.unpackb(encode_body(message))
    for path in paths_into(fields):
        value = functools.reduce(lambda inside, key: inside[key], path, fields)
        for other in of_another_type(value):
            data = msgpack.packb([message.kind, replaced(fields, path, other)])
            with pytest.raises(RemoteProtocolError):
                decode_untrusted(data, type(message))


@by_kind
def test_missing_and_extra_fields_are_refused(message: Message) -> None:
    fields = msgpack.unpackb(encode_body(message))
    with pytest.raises(RemoteProtocolError):
        decode_untrusted(msgpack.packb([message.kind, {**fields, "extra": 1}]), type(message))
    for name, field in type(message).model_fields.items():
        if field.is_required():
            rest = {key: value for key, value in fields.items() if key != name}
            with pytest.raises(RemoteProtocolError):
                decode_untrusted(msgpack.packb([message.kind, rest]), type(message))


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_the_remote_error(data: bytes) -> None:
    for attempt in (
        lambda: decode_untrusted(data, *EVERYTHING),
        lambda: market.Bid.from_body_untrusted(data),
    ):
        with contextlib.suppress(RemoteProtocolError):
            attempt()


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


WITHOUT_FIELDS = {message for message in KINDS.values() if not message.model_fields}


@given(st.sampled_from(sorted(KINDS)), trees)
@example("relay-reached/1", {})
def test_well_formed_nonsense_raises_only_the_remote_error(kind: str, tree: object) -> None:
    try:
        data = msgpack.packb([kind, tree])
    except (UnicodeEncodeError, ValueError):
        return
    if tree == {} and KINDS[kind] in WITHOUT_FIELDS:
        assert decode_untrusted(data, KINDS[kind]) == KINDS[kind]()
        return
    with pytest.raises(RemoteProtocolError):
        decode_untrusted(data, KINDS[kind])


@given(st.data())
def test_a_flipped_message_decodes_to_something_sayable_or_is_refused(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(SAMPLES))
    mutated = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_untrusted(bytes(mutated), type(message))
    except RemoteProtocolError:
        return
    assert decode_untrusted(encode(decoded), type(message)) == decoded


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_hostile_megabyte_costs_little(name: str) -> None:
    started_at = time.process_time()
    with pytest.raises(RemoteProtocolError):
        decode_untrusted(MEGABYTES[name], *EVERYTHING)
    assert time.process_time() - started_at < 1  # the worst takes a fifth of it
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError):
        decode_untrusted(MEGABYTES[name], *EVERYTHING)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def test_what_is_not_asked_for_takes_no_bytes() -> None:
    """Most requests have neither tools nor logprobs, and of token deltas there are very many."""
    request_id = "req_" + "0" * 32
    for record, fields in (
        (inference.Sampling(max_tokens=1), 12),
        (inference.Prompt(nonce=bytes(16), text="a"), 4),
        (inference.ChatTurn(role="user", content="a"), 2),
        (inference.TokenDelta(request_id=request_id, position=0, token_ids=(1,), text="a"), 4),
    ):
        assert len(msgpack.unpackb(encode_body(record))) == fields
        assert type(record).model_validate(msgpack.unpackb(encode_body(record), use_list=False))
    assert b"logprobs" in encode_body(inference.Sampling(max_tokens=1, logprobs=0))


def test_what_no_peer_would_take_is_our_own_error() -> None:
    turn = inference.ChatTurn(role="user", content="x" * 600_000)
    with pytest.raises(LocalProtocolError):
        encode(
            inference.Dispatch(
                request_id="req_" + "0" * 32,
                token=SAMPLES[0],
                prompt=inference.Prompt(nonce=bytes(16), turns=(turn, turn)),
                sampling=inference.Sampling(max_tokens=1),
            )
        )


def write_golden() -> None:
    """`python tests/protocol/test_wire.py` writes the golden bytes anew, after a wanted change."""
    golden = {sample.kind: encode(sample).hex() for sample in SAMPLES}
    GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
