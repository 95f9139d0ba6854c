"""Every number, text and list that a peer may say has a bound, written in its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field
from test_wire import all_messages

from pinaivu_node.protocol.wire import Record

ANYTHING = {"any", "dict", "list", "set", "frozenset", "generator", "json", "is-instance"}
"""What no message is made of: it has no bound, or could not be frozen."""


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Each type that a message is made of, as pydantic sees it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for inner in schema.values():
            yield from schemas_in(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            yield from schemas_in(inner)


def unbounded(record: type[Record]) -> Iterator[str]:
    """What is missing, one line each."""
    for schema in schemas_in(record.__pydantic_core_schema__):
        match schema["type"]:
            case "str" | "bytes" if "max_length" not in schema:
                yield f"{schema['type']} without max_length"
            case "int" | "float" if not (
                schema.keys() & {"ge", "gt"} and schema.keys() & {"le", "lt"}
            ):
                yield f"{schema['type']} without bounds"
            case "tuple" if "variadic_item_index" in schema:
                yield from (
                    f"tuple without {name}"
                    for name in ("max_length", "fail_fast")
                    if name not in schema
                )
            case kind if kind in ANYTHING:
                yield f"{kind} in a message"


@pytest.mark.parametrize("message", all_messages(), ids=lambda each: each.kind)
def test_everything_is_bounded(message: type[Record]) -> None:
    assert not list(unbounded(message))


class Careless(Record):
    text: str
    blob: bytes
    number: int
    half: Annotated[float, Field(ge=0)]
    items: tuple[Annotated[int, Field(ge=0, le=1)], ...]
    endless: Annotated[tuple[bool, ...], Field(max_length=3)]
    whatever: dict[str, bool]


def test_carelessness_is_seen() -> None:
    assert set(unbounded(Careless)) >= {
        "str without max_length",
        "bytes without max_length",
        "int without bounds",
        "float without bounds",
        "tuple without max_length",
        "tuple without fail_fast",
        "dict in a message",
    }
