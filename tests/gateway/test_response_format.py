"""What an answer is to look like, from OpenAI's words to the network's."""

from __future__ import annotations

import pytest

from pinaivu_gateway.errors import RequestRefused
from pinaivu_gateway.logprobs import chat_logprobs
from pinaivu_gateway.response_format import JsonSchema, NamedSchema, constraint_of
from pinaivu_node.protocol.inference import (
    MAX_CONSTRAINT_CHARACTERS,
    ConstraintKind,
    TokenLogprob,
)


def formatted(schema) -> JsonSchema:
    return JsonSchema(type="json_schema", json_schema=NamedSchema(name="a", schema=schema))


def test_a_schema_travels_as_it_was_written():
    constraint = constraint_of(formatted({"b": 1, "a": [None, "é"]}))
    assert constraint is not None
    assert constraint.kind is ConstraintKind.JSON_SCHEMA
    assert constraint.text == '{"b":1,"a":[null,"é"]}'


def test_without_a_schema_any_object_will_do():
    constraint = constraint_of(formatted({}))
    assert constraint is not None
    assert constraint.kind is ConstraintKind.JSON_OBJECT


def test_half_a_character_in_a_schema_does_no_harm():
    constraint = constraint_of(formatted({"const": "a\ud83d"}))
    assert constraint is not None
    assert constraint.text.encode() == '{"const":"a\ufffd"}'.encode()


def test_a_schema_has_its_limits():
    fits = "x" * (MAX_CONSTRAINT_CHARACTERS - len('{"const":""}'))
    assert constraint_of(formatted({"const": fits})) is not None
    nested: dict[str, object] = {}
    for _ in range(100_000):
        nested = {"not": nested}
    for schema in ({"const": fits + "x"}, nested):
        with pytest.raises(RequestRefused) as refused:
            constraint_of(
                JsonSchema.model_construct(
                    type="json_schema", json_schema=NamedSchema.model_construct(schema_=schema)
                )
            )
        assert refused.value.problem.param == "response_format.json_schema.schema"


def test_a_part_of_a_character_is_told_by_its_bytes():
    [entry] = chat_logprobs([TokenLogprob(chosen=(5, b"\xc3", -0.5))])["content"]
    assert entry == {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": []}
