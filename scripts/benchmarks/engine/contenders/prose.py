"""Prompts that make sense, for what depends on it: constraints, and guesses from the prompt."""

from __future__ import annotations

import json
from typing import Any, Final

_THINGS: Final = (
    "rivers of Europe", "kinds of bread", "planets and moons", "tools of a carpenter",
    "birds of the sea", "towns in Italy", "games for children", "plants of the desert",
)  # fmt: skip
_TOPICS: Final = (
    "a lighthouse keeper who finds a letter", "how a bicycle stays upright",
    "the first winter of a young fox", "why the sea is salty",
    "a clockmaker and his apprentice", "how bread rises",
    "a journey by night train", "what a gardener does in spring",
)  # fmt: skip
LISTS: Final = tuple(f"List {things} with a short remark on each, as JSON." for things in _THINGS)
STORIES: Final = tuple(f"Write a long text about {topic}." for topic in _TOPICS)
_RECORD: Final = "\n".join(
    f'    self.{name} = settings.get("{name}", {value})  # {why}'
    for name, value, why in (
        ("host", '"127.0.0.1"', "where to listen"),
        ("port", "8080", "any that is free"),
        ("timeout", "30.0", "seconds until a client is given up"),
        ("workers", "4", "threads that serve"),
        ("backlog", "128", "connections that may wait"),
        ("log_level", '"info"', "how much is said"),
    )
)
COPIES: Final = tuple(
    f"Repeat this code exactly, with no other change than the class's name, which is {name}:\n"
    f"class Settings:\n  def __init__(self, settings):\n{_RECORD}"
    for name in ("Server", "Client", "Gateway", "Worker", "Proxy", "Daemon", "Relay", "Hub")
)
KINDS: Final = {"new": STORIES, "copied": COPIES}


def chat(text: str) -> Any:
    """A user's single turn."""
    from pinaivu_node.engine.types import ChatMessage

    return (ChatMessage(role="user", content=text),)


def constraint() -> Any:
    """A list of records that is longer than any answer here, so that no stream ends early."""
    from pinaivu_node.engine.types import Constraint, ConstraintKind

    record = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "remark": {"type": "string"}},
        "required": ["name", "remark"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": record, "minItems": 200}
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
