"""OpenAI's `response_format`: which language the answer is to be a sentence of."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, assert_never

from pydantic import BeforeValidator, Discriminator, Field, Tag

from pinaivu_gateway.openai_struct import Struct, schema_text
from pinaivu_node.protocol.inference import Constraint, ConstraintKind

_TYPES: Final = ("text", "json_object", "json_schema")
_SCHEMA: Final = "response_format.json_schema.schema"


class PlainText(Struct):
    """Anything."""

    type: Literal["text"]


class JsonObject(Struct):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Struct):
    """A schema; `strict` makes no difference, since the answer is held to it in any case."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=16384)] = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = False


class JsonSchema(Struct):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _known(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") not in _TYPES:
        raise ValueError(f"'type' must be one of {', '.join(_TYPES)}")
    return value


ResponseFormat = Annotated[
    Annotated[PlainText, Tag("~text")]
    | Annotated[JsonObject, Tag("~json_object")]
    | Annotated[JsonSchema, Tag("~json_schema")],
    Discriminator(lambda value: f"~{value['type']}" if isinstance(value, dict) else None),
    BeforeValidator(_known),
]


def constraint_of(wanted: PlainText | JsonObject | JsonSchema | None) -> Constraint | None:
    """What the engine is to hold the answer to; None if it is free.

    Raises RequestRefused for a schema that is too large.  Whether it is one that can be compiled
    is for the provider to say.
    """
    match wanted:
        case None | PlainText():
            return None
        case JsonObject():
            return Constraint(kind=ConstraintKind.JSON_OBJECT)
        case JsonSchema(json_schema=named):
            if not named.schema_:
                return Constraint(kind=ConstraintKind.JSON_OBJECT)
            return Constraint(
                kind=ConstraintKind.JSON_SCHEMA, text=schema_text(named.schema_, param=_SCHEMA)
            )
        case _:
            assert_never(wanted)
