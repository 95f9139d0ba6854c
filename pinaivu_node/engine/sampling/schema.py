"""A stranger's JSON schema, looked through before a grammar is made of it.

Making a grammar cannot be interrupted, and llguidance's own limits do not bound all of it: what is
counted here is what makes it, or a mask, take seconds or gigabytes.  The numbers are far over what
schemas in use need; where OpenAI states a limit for structured outputs, it is no lower than that.

References may point anywhere in a document, so any part of it may be read as a schema: keywords
are counted wherever they stand, and the same word as a property's name costs a little room.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final

MAX_DEPTH: Final = 100
"""Of braces and brackets; llguidance reads 127, and a grammar around the schema has some."""
MAX_PROPERTIES: Final = 5000
"""Altogether; OpenAI's limit.  A third of a second."""
MAX_OPTIONAL: Final = 500
"""In one object: any of them may come next, which is four rules each for every token."""
MAX_VALUES: Final = 10_000
"""Of all `enum`s; ten times OpenAI's limit."""
MAX_BRANCHES: Final = 1000
"""Of all `anyOf`, `oneOf` and `allOf`."""
MAX_LITERAL: Final = 4096
"""Characters of one string that the answer must have as it is: a mask takes time in proportion,
1 ms for so many."""
MAX_PATTERN: Final = 2048
"""Characters of one regular expression."""
MAX_PATTERNS: Final = 8192
"""Characters of all: it takes time with their square, 0.1 s for so many."""
MAX_MERGED_PATTERNS: Final = 16
"""In a schema where a string may have to match several: to tell whether any string matches them
all took 0.3 s for 16, and no end of time for 200."""
MAX_PATTERN_PROPERTIES: Final = 32
"""Altogether: each is compared with each, and 200 took two seconds."""
MAX_MULTIPLE: Final = 10_000
"""Product of all numbers in `multipleOf`: so many states an automaton may have that tells whether
a number is a multiple of one of them."""
_MERGING: Final = frozenset({"$ref", "anyOf", "oneOf"})


class SchemaRefused(ValueError):
    """It would take too long; the text says what of it."""


def read_untrusted(text: str) -> dict[str, Any]:
    """The schema, as an object; ValueError if it is none, SchemaRefused if it is too much."""
    try:
        schema = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise _too_deep() from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")  # noqa: TRY004 - a value of theirs
    _Count().all_of(schema)
    return schema


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _too_deep() -> SchemaRefused:
    return SchemaRefused(f"it is nested over {MAX_DEPTH} levels deep")


class _Count:
    """What there is of everything that costs."""

    def __init__(self) -> None:
        self._properties = 0
        self._values = 0
        self._branches = 0
        self._patterns = 0
        self._pattern_characters = 0
        self._merges = False
        self._pattern_properties = 0
        self._multiple = 1

    def all_of(self, schema: dict[str, Any]) -> None:
        """Count a whole document; SchemaRefused as soon as it is too much."""
        open_parts: list[Iterator[Any]] = [iter((schema,))]
        while open_parts:
            for part in open_parts[-1]:
                if isinstance(part, dict):
                    self._keywords(part)
                    open_parts.append(iter(part.values()))
                    break
                if isinstance(part, list):
                    open_parts.append(iter(part))
                    break
                if isinstance(part, str):
                    _at_most(len(part), MAX_PATTERNS, "characters in one string")
            else:
                open_parts.pop()
            if len(open_parts) > MAX_DEPTH + 1:
                raise _too_deep()
        if self._merges:
            _at_most(self._patterns, MAX_MERGED_PATTERNS, "patterns where several may be for one")

    def _keywords(self, schema: dict[str, Any]) -> None:  # noqa: C901 - a table would be longer
        self._merges |= "allOf" in schema or (
            "pattern" in schema and not _MERGING.isdisjoint(schema)
        )
        for keyword, value in schema.items():
            match keyword, value:
                case "properties", dict():
                    self._object(value, schema.get("required"))
                case "enum", list():
                    self._values += len(value)
                    _at_most(self._values, MAX_VALUES, 'values in "enum"')
                    for each in value:
                        _literal(each)
                case "const", _:
                    _literal(value)
                case (("anyOf" | "oneOf" | "allOf"), list()):
                    self._branches += len(value)
                    _at_most(self._branches, MAX_BRANCHES, 'schemas in "anyOf", "oneOf", "allOf"')
                case "pattern", str():
                    self._pattern(value)
                case "patternProperties", dict():
                    self._pattern_properties += len(value)
                    for pattern in value:
                        self._pattern(pattern)
                    _at_most(
                        self._pattern_properties, MAX_PATTERN_PROPERTIES, '"patternProperties"'
                    )
                case "multipleOf", int() | float() if not isinstance(value, bool):
                    self._multiple *= max(1, abs(Fraction(str(value)).numerator))
                    _at_most(self._multiple, MAX_MULTIPLE, 'states for "multipleOf"')
                case _:
                    pass

    def _object(self, properties: dict[str, Any], required: object) -> None:
        self._properties += len(properties)
        _at_most(self._properties, MAX_PROPERTIES, "properties")
        for name in properties:
            _literal(name)
        needed = set(_names(required))
        optional = sum(name not in needed for name in properties)
        _at_most(optional, MAX_OPTIONAL, "optional properties in one object")

    def _pattern(self, pattern: str) -> None:
        _at_most(len(pattern), MAX_PATTERN, "characters in one pattern")
        self._patterns += 1
        self._pattern_characters += len(pattern)
        _at_most(self._pattern_characters, MAX_PATTERNS, "characters in all patterns")


def _names(required: object) -> Iterator[str]:
    return (
        (name for name in required if isinstance(name, str))
        if isinstance(required, list)
        else iter(())
    )


def _literal(value: object) -> None:
    if isinstance(value, str):
        _at_most(len(value), MAX_LITERAL, "characters in one value")


def _at_most(count: int, most: int, what: str) -> None:
    if count > most:
        raise SchemaRefused(f"too many {what}: {count}; at most {most}")
