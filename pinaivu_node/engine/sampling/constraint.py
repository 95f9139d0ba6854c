"""Answers that must match something: a constraint to a mask of the tokens that may come next.

llguidance makes the masks, lazily, token by token, within limits on its work: whatever a stranger's
schema says, neither compiling it nor any one mask takes long.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import llguidance.hf
import torch
from llguidance import LLMatcher, LLParserLimits

from pinaivu_node.engine.types import Constraint, ConstraintKind, PromptRefused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_CHARACTERS: Final = 1 << 18
_MAX_CACHED: Final = 64
"""Compiled grammars; the largest hold some megabytes each."""
_JSON_DEFAULTS: Final[JsonCompileOptions] = {"whitespace_flexible": False}
"""No space but what JSON needs: a model that may write spaces can write nothing else for ever."""
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000
)
"""By llguidance's own figures some 20 ms for a grammar, 15 ms for a mask."""


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why this grammar cannot be followed any further; None if it can."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill(self, mask: torch.Tensor) -> None:
        """Set the bits of the tokens that may come next in an int32 row; none if it failed."""
        if self._matcher.is_error():
            mask.zero_()
            return
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * mask.numel())

    def accept(self, token_id: int) -> bool:
        """Go on by this token; whether it was allowed."""
        return bool(self._matcher.consume_token(token_id))


class ConstraintCompiler:
    """Constraints to matchers, for one tokenizer.  Compiled grammars are kept."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_ids: Collection[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Read the vocabulary: half a second that the first constraint would wait for."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.hf.from_tokenizer(
                    self._hf_tokenizer, self._vocabulary, eos_token=self._eos_ids or None
                )

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning; PromptRefused if this is no constraint that can be met."""
        self.warm_up()
        with self._lock:
            compiled = self._compiled.get(constraint)
            if compiled is None:
                compiled = self._compiled[constraint] = self._new(constraint)
                if len(self._compiled) > _MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(constraint)
            return Matcher(compiled.deep_copy())

    def _new(self, constraint: Constraint) -> Any:
        if len(constraint.text) > MAX_SOURCE_CHARACTERS:
            raise PromptRefused(
                f"The constraint is over the limit of {MAX_SOURCE_CHARACTERS} characters."
            )
        try:
            grammar = _grammar(constraint)
        except (ValueError, RecursionError) as exc:
            raise PromptRefused(f"The constraint cannot be used: {exc}") from exc
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise PromptRefused(f"The constraint cannot be used: {matcher.get_error()}")
        return matcher


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own terms; ValueError if it is not even well formed."""
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON_DEFAULTS)
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(
                json.loads(constraint.text), defaults=_JSON_DEFAULTS
            )
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICE:
            choices = json.loads(constraint.text)
            if not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError("a choice is a list of strings")
            words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
            return LLMatcher.grammar_from_lark(f"start: {words}")
        case ConstraintKind.LARK:
            return LLMatcher.grammar_from_lark(constraint.text)
