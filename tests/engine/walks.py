"""Random walks under a constraint: what a model that knows nothing would write."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import jsonschema
import numpy as np
import torch

from pinaivu_node.engine.chat.token_bytes import TokenBytes
from pinaivu_node.engine.sampling.constraint import ConstraintCompiler
from pinaivu_node.engine.types import Constraint, ConstraintKind


@dataclass
class Walker:
    """Walks over one tokenizer's vocabulary."""

    def __init__(self, tokenizer, *, vocabulary: int) -> None:
        self.tokens = TokenBytes(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.compiler = ConstraintCompiler(tokenizer, vocabulary=vocabulary, eos_ids={self.eos})
        self.mask = torch.zeros(-(-vocabulary // 32), dtype=torch.int32)
        ends = set(b'"}],')
        self.ends = {at for at in range(len(tokenizer)) if set(self.tokens.of(at)) & ends}

    def allowed(self, matcher) -> set[int]:
        matcher.fill(self.mask)
        bits = np.unpackbits(self.mask.numpy().view(np.uint8), bitorder="little")
        return set(bits.nonzero()[0].tolist())

    def walk(self, constraint: Constraint, dice, *, steps: int = 300, haste: float = 0.4):
        """The text, and whether it came to an end.  The end is allowed exactly where the text is
        whole.
        """
        matcher = self.compiler.compile(constraint)
        said = b""
        for _ in range(steps):
            allowed = self.allowed(matcher)
            assert matcher.error is None
            assert allowed
            assert (self.eos in allowed) == is_whole(constraint, said), said
            if self.eos in allowed and dice.random() < haste:
                return said.decode(), True
            allowed.discard(self.eos)
            ending = sorted(allowed & self.ends)
            hurry = ending and dice.random() < haste
            chosen = dice.choice(ending if hurry else sorted(allowed)) if allowed else self.eos
            if chosen == self.eos:
                return said.decode(), True
            assert matcher.accept(chosen)
            said += self.tokens.of(chosen)
            if matcher.is_finished:
                assert is_whole(constraint, said), said
                return said.decode(), True
        return said.decode(errors="replace"), False


def is_whole(constraint: Constraint, said: bytes) -> bool:
    """Whether this is a whole answer, by readers that know nothing of grammars."""
    try:
        text = said.decode()
    except UnicodeDecodeError:
        return False
    match constraint.kind:
        case ConstraintKind.REGEX:
            return re.fullmatch(constraint.text, text) is not None
        case ConstraintKind.CHOICE:
            return text in json.loads(constraint.text)
        case ConstraintKind.JSON_OBJECT:
            return _validates(text, {"type": "object"})
        case ConstraintKind.JSON_SCHEMA:
            return _validates(text, json.loads(constraint.text))
        case ConstraintKind.LARK:
            raise AssertionError


def _validates(text, schema) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def schema(document) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(document))


def regex(text) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


def choice(*words) -> Constraint:
    return Constraint(ConstraintKind.CHOICE, json.dumps(words))


def lark(text) -> Constraint:
    return Constraint(ConstraintKind.LARK, text)


def struct(properties, required=None, **more):
    """An object as OpenAI's strict mode wants it."""
    required = list(properties) if required is None else required
    fixed = {"type": "object", "additionalProperties": False}
    return fixed | {"properties": properties, "required": required} | more


TEXT = {"type": "string", "maxLength": 12}
REST = {"$ref": "#/$defs/node"}
WHOLE = {"type": "integer"}
SCHEMAS = {
    "person": struct({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    "optional": struct({"name": TEXT, "nick": TEXT, "age": WHOLE}, ["name"]),
    "open": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
    "list": struct({"tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1}}),
    "null": struct({"a": {"type": ["string", "null"]}, "b": {"anyOf": [WHOLE, {"type": "null"}]}}),
    "linked": {"$ref": "#/$defs/node"}
    | {
        "$defs": {
            "node": struct({"v": WHOLE, "next": {"anyOf": [REST, {"const": 0}]}})
        }
    },
    "union": {
        "oneOf": [
            struct({"kind": {"const": "cat"}, "lives": WHOLE}),
            struct({"kind": {"const": "dog"}, "barks": {"type": "boolean"}}),
        ]
    },
    "pattern": struct({"plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"}}),
    "lengths": struct({"title": {"type": "string", "minLength": 3, "maxLength": 7}}),
    "map": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 3},
    "names": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,8}$": TEXT},
        "additionalProperties": False,
    },
    "pair": struct({"p": {"type": "array", "prefixItems": [TEXT, WHOLE], "minItems": 2}
                    | {"items": False}}),
    "both": {"allOf": [{"type": "object", "properties": {"id": WHOLE}, "required": ["id"]},
                       {"properties": {"name": TEXT}, "required": ["name"]}]},
    "bounds": struct({"q": {"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 90},
                      "p": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}),
    "values": struct({"v": {"enum": ["x", 1, None, True, {"a": [1]}, "値", "<|im_end|>"]}}),
    "names of all kinds": struct({"naïve": WHOLE, "日本": TEXT, 'a "b"': TEXT, "": WHOLE}),
    "anything": {},
    "words": struct({"a": TEXT | {"title": "A", "default": "x", "deprecated": True}}, title="T"),
}  # fmt: skip
REGEXES = [
    "[a-z]{2,5}", "(ab|cd)*e?", "[0-9]+([.][0-9]+)?", "", "a|", ".{3}", "[^x]{0,9}",
    "(yes|no)( maybe)?", "(?i:yes)", "😀+|日本", "(a|ab)(c|bcd)(d*)", "\\{\"a\": [0-9]\\}",
]  # fmt: skip
CHOICES = [
    ("yes", "no"), ("a", "aa", "aaa"), ("", "x"), ("<|im_end|>", "<|im_start|>user"),
    ('"', "\\", "\n", "\t", "/", "\x7f", "\x00", "\x1b"), ("日本", "日", "😀"), ("a", "a"),
    ("x" * 300,),
]  # fmt: skip
